"""Conditioning augmentation: blur against closed forms, and two noise levels on data whose denoiser is known."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.pixel_upscalers import NETWORK, NOISING, SAMPLER, save
from torch import Tensor

from stepfuse import Engine, EngineConfig
from stepfuse.engine.cascade import Cascade, Stage
from stepfuse.engine.components import Components
from stepfuse.engine.loading import load_components
from stepfuse.engine.low_resolution import blur
from stepfuse.engine.models.unet import Conditioning
from stepfuse.engine.models.unet_config import UNetConfig
from stepfuse.engine.runtimes.exported import FixedKernels
from stepfuse.engine.runtimes.user_network import UserInputs
from stepfuse.engine.sampling.scheduler_config import SchedulerConfig
from stepfuse.engine.sampling.schedules import NoiseSchedule

# Blur.


@pytest.mark.parametrize(("sigma", "gate"), [(1.0, 2e-4), (2.5, 2e-4), (0.8, 2e-3)])
@pytest.mark.parametrize("m", [0, 1, 4, 9])
def test_a_cosine_is_only_scaled(sigma: float, gate: float, m: int) -> None:
    """By exp(-sigma^2 k^2 / 2): what a Gaussian does to a wave, up to the pixels it is sampled at."""
    k, i = math.pi * m / 32, torch.arange(32, dtype=torch.float64) + 0.5
    wave = torch.cos(k * i).expand(1, 2, 7, 32)
    scale = math.exp(-(sigma**2) * k**2 / 2)
    assert (blur(wave, sigma) - scale * wave).abs().max() <= gate
    assert (blur(wave.mT, sigma) - scale * wave.mT).abs().max() <= gate


def test_a_point_becomes_the_sampled_gaussian() -> None:
    point = torch.zeros(1, 1, 41, 41, dtype=torch.float64)
    point[..., 20, 20] = 1
    weights = torch.exp(-((torch.arange(41, dtype=torch.float64) - 20) ** 2) / (2 * 1.5**2))
    weights[(torch.arange(41) - 20).abs() > 6] = 0
    expected = torch.outer(weights, weights) / weights.sum() ** 2
    assert (blur(point, 1.5)[0, 0] - expected).abs().max() <= 1e-15


@settings(max_examples=25, deadline=None)
@given(
    sigma=st.floats(0, 30, exclude_min=True), height=st.integers(1, 9), width=st.integers(1, 9), seed=st.integers(0, 99)
)
def test_the_mean_stays_and_nothing_leaves_its_range(sigma: float, height: int, width: int, seed: int) -> None:
    images = torch.rand(2, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    made = blur(images, sigma)
    assert torch.allclose(made.mean((-2, -1)), images.mean((-2, -1)), atol=1e-13)
    assert made.min() >= images.min() - 1e-13
    assert made.max() <= images.max() + 1e-13
    assert blur(images, 0.0) is images


def test_two_blurs_are_one_of_the_root_of_their_squares() -> None:
    images = torch.rand(1, 3, 24, 30, dtype=torch.float64)
    assert (blur(blur(images, 3.0), 4.0) - blur(images, 5.0)).abs().max() <= 1e-3


def test_the_x4_upscaler_sees_the_blurred_image(reference_pipeline: Callable[[str], Path]) -> None:
    image = np.random.default_rng(0).random((8, 12, 3), dtype=np.float32)
    blurred = scipy.ndimage.gaussian_filter(image, 1.0, mode="reflect", axes=(0, 1))
    fields: dict[str, Any] = {"steps": 2, "seed": 1, "guidance_scale": 3.0, "output": "latent"}
    with Engine.load(reference_pipeline("x4_upscaler"), device="cpu") as engine:
        sharp, same, soft, by_hand = (
            engine.generate("a cat", image=given, blur=sigma, **fields).latents
            for given, sigma in ((image, None), (image, 0), (image, 1.0), (blurred, None))
        )
    assert torch.equal(sharp, same)
    assert float((soft - by_hand).norm() / by_hand.norm()) <= 1e-4
    assert float((soft - sharp).norm() / sharp.norm()) > 1e-2


# Both levels, on Gaussian data: x = a y + sqrt(1 - a^2) xi, y the low-resolution image enlarged, of unit variance.

SHARE = 0.8
STEPS = 100
STEPS_APART = 1000 // STEPS


class Exact:
    """E[noise | x_t, z] of x given z = alpha_z y + sigma_z eps, that is of N(a alpha_z z, 1 - a^2 alpha_z^2).

    It learns t and the level of z as every network does: from `prepare`.
    """

    dtype = torch.float32

    def __init__(self, config: UNetConfig) -> None:
        self.config = config
        self.low, self.own = (NoiseSchedule.from_options(SchedulerConfig.from_diffusers(one).resolve(one_sampler))
                              for one, one_sampler in ((NOISING, "ddpm"), (SAMPLER, "ddim")))  # fmt: skip

    def prepare(self, conditioning: Conditioning, timesteps: Tensor) -> UserInputs:
        assert conditioning.class_labels is not None
        level = conditioning.class_labels[:, None].expand(timesteps.shape).to(timesteps)
        return UserInputs(time=torch.stack([timesteps, level], -1))

    def __call__(self, latents: Tensor, prepared: UserInputs, update: Tensor) -> Tensor:
        x, z = latents.chunk(2, 1)
        rows = prepared.time[torch.arange(len(x)), update]
        made = []
        for row, (t, level) in enumerate(rows.tolist()):
            alpha, sigma, _ = self.own.level(int(t))
            share = SHARE * self.low.level(int(level)).alpha
            variance = alpha**2 * (1 - share**2) + sigma**2
            made.append(sigma * (x[row] - alpha * share * z[row]) / variance)
        return torch.stack(made)


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Components:
    """A grey upscaler to 64 x 64 whose network knows its data."""
    folder = tmp_path_factory.mktemp("exact")
    network = NETWORK | {"sample_size": 64, "in_channels": 2, "out_channels": 1, "class_embed_type": "timestep"}
    save(folder, network, noising="low_res_scheduler")
    parts = load_components(folder, EngineConfig(device="cpu", max_rows=4))
    known: Any = Exact(parts.denoiser.config)
    return dataclasses.replace(parts, denoiser=known, binders={"unet": FixedKernels("exact")})


@pytest.mark.parametrize("level", [0, 300, 700])
def test_two_levels_give_the_conditional_distribution(exact: Components, level: int) -> None:
    """The state of every pixel is a known linear function of its three numbers, and their law is that of x given y.

    For data N(m, s^2) DDIM takes x_t - alpha m to (alpha' alpha s^2 + sigma' sigma) / (alpha^2 s^2 + sigma^2) of it.
    """
    grey = 0.9
    fields: dict[str, Any] = {"image": np.full((16, 16, 3), grey, np.float32), "noise_level": level, "steps": STEPS}
    with Engine(exact) as engine:
        found, law = (
            engine.generate(sampler=sampler, n=4, seed=5, output="latent", **fields).latents.double()
            for sampler in ("ddim", "dpmpp_2m")
        )
    network: Any = exact.denoiser
    at, y = network.low.level(level), 2 * grey - 1
    share = SHARE * at.alpha
    times = [STEPS_APART * i for i in reversed(range(STEPS))]
    levels = [network.own.level(t) for t in times]
    factor, spread = 1.0, 1 - share**2
    ends = [(one.alpha, one.sigma) for one in levels[1:]] + [(1.0, 0.0)]
    for (alpha, sigma, _), (next_alpha, next_sigma) in zip(levels, ends, strict=True):
        factor *= (next_alpha * alpha * spread + next_sigma * sigma) / (alpha**2 * spread + sigma**2)
    for row, image in enumerate(found):
        generator = torch.Generator().manual_seed(5 + row)
        eps, noise = (torch.randn((1, 64, 64), generator=generator).double() for _ in range(2))
        mean = share * (at.alpha * y + at.sigma * eps)
        assert (image - mean - factor * (noise - levels[0].alpha * mean)).abs().max() <= 2e-5
    assert law.mean() == pytest.approx(share * at.alpha * y, abs=0.03)
    assert law.var() == pytest.approx(1 - share**2 * at.alpha**2, rel=0.05)


def test_tiles_of_a_network_that_sees_single_pixels_are_the_whole(exact: Components) -> None:
    """Both noises are of the whole: those of tiles with noises of their own differ where tiles overlap."""
    image = np.random.default_rng(4).random((16, 16, 3), dtype=np.float32)
    request: dict[str, Any] = {"image": image, "n": 2, "seed": 3, "steps": 2, "noise_level": 300}
    stage = {"noise_level": 700, "blur": 1.5, "steps": 5}
    with Engine(exact) as engine:
        whole, tiled = (
            engine.generate(cascade=Cascade(name="c", stages=(Stage(), one)), output="latent", **request).latents
            for one in (Stage(scale=1.5, request=stage), Stage(scale=1.5, tile=40, overlap=12, request=stage))
        )
    assert whole.shape == (2, 1, 96, 96)
    assert (tiled - whole).abs().max() <= 1e-5
