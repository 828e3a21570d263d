"""The built-in upscaler `shapes-x4`: what is shipped, that diffusers reads it, and that it beats Lanczos."""

import json
import random
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    StableDiffusionUpscalePipeline,
    UNet2DConditionModel,
)

from stepfuse.engine.models.unet_config import UNetConfig
from stepfuse.engine.weights.checkpoint import Checkpoint
from stepfuse.engine.weights.detect import detect
from stepfuse.examples.shapes.render import render, render_window
from stepfuse.examples.shapes.scenes import sample_single
from stepfuse.examples.shapes.upscaler import LOW_RES_SCHEDULER, MAX_LEVEL, upscale
from stepfuse.examples.shapes.upscaler_evaluate import (
    enlarge_with_engine,
    heldout_scenes,
    large_images,
    psnr,
    resample,
    small_images,
)
from stepfuse.examples.shapes.upscaler_latents import CHANNELS, encode_images
from stepfuse.examples.shapes.upscaler_package import FOLDER_LIMIT, SCALING_FACTOR, SHIPPED
from stepfuse.examples.shapes.upscaler_scenes import SCALE, window_near_outline


@pytest.fixture(scope="module")
def networks() -> tuple[UNet2DConditionModel, AutoencoderKL]:
    """As diffusers loads them, every key used and none missing."""
    loaded: list[Any] = []
    for kind, part in ((UNet2DConditionModel, "unet"), (AutoencoderKL, "vae")):
        found: Any = kind.from_pretrained(SHIPPED / part, output_loading_info=True)
        assert not any(found[1][name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        loaded.append(found[0].float().eval())
    return loaded[0], loaded[1]


def test_the_folder_is_small_and_of_the_upscalers_layout() -> None:
    files = [path for path in SHIPPED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= FOLDER_LIMIT
    checkpoint = Checkpoint.open(SHIPPED)
    assert detect(checkpoint).architecture == "x4_upscaler"
    assert checkpoint.options["max_noise_level"] == MAX_LEVEL
    config = UNetConfig.from_diffusers(checkpoint.config("unet"))
    assert (config.class_embedding, config.class_dim) == ("table", MAX_LEVEL + 1)
    assert config.in_channels == CHANNELS + 3
    assert all(level.attention == "none" for level in (*config.down, *config.up))
    defaults = json.loads((SHIPPED / "stepfuse.json").read_text())
    assert (defaults["width"], defaults["height"], defaults["guidance_scale"]) == (256, 256, 1.0)


def test_schedulers_are_what_training_used() -> None:
    low_res = DDPMScheduler.from_pretrained(SHIPPED / "low_res_scheduler")
    assert torch.equal(low_res.alphas_cumprod, DDPMScheduler(**LOW_RES_SCHEDULER).alphas_cumprod)
    scheduler = DDIMScheduler.from_pretrained(SHIPPED / "scheduler")
    assert scheduler.config.prediction_type == "sample"
    assert scheduler.config.timestep_spacing == "trailing"


def test_it_beats_lanczos_by_two_decibels(networks: tuple[UNet2DConditionModel, AutoencoderKL]) -> None:
    scenes = heldout_scenes()[::34]
    small, truth = small_images(scenes), large_images(scenes)
    images = upscale(*networks, torch.from_numpy(small).permute(0, 3, 1, 2) * 2 - 1, steps=4, level=0)
    images = (images.permute(0, 2, 3, 1).numpy() + 1) / 2
    gain = psnr(images, truth) - psnr(resample(small, "lanczos"), truth)
    assert gain.mean() >= 2
    assert gain.min() > 0


def test_the_small_picture_decides_and_not_the_noise(networks: tuple[UNet2DConditionModel, AutoencoderKL]) -> None:
    small = torch.from_numpy(render(heldout_scenes()[:2])) * 2 - 1
    small = small[:, :, 16:48, 16:48]  # no size is built in
    one, other = (upscale(*networks, small, steps=4, level=0, seed=seed) for seed in (1, 2))
    assert one.shape == (2, 3, 128, 128)
    assert (one - other).square().mean() < 1e-3
    assert (one[0] - one[1]).square().mean() > 1e-2


def test_engine_and_diffusers_pipeline_enlarge_alike(networks: tuple[UNet2DConditionModel, AutoencoderKL]) -> None:
    absent = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor", "watermarker"))
    pipe = StableDiffusionUpscalePipeline.from_pretrained(SHIPPED, dtype=torch.float32, **absent)
    small = small_images(heldout_scenes()[:1])[:, 16:48, 8:40]
    theirs = pipe(
        prompt_embeds=torch.zeros(1, 1, 1),  # the network reads none, the pipeline wants some
        image=torch.from_numpy(small).permute(0, 3, 1, 2),
        num_inference_steps=4,
        guidance_scale=1.0,
        noise_level=7,
        generator=torch.Generator().manual_seed(3),
        output_type="np",
    ).images
    ours = enlarge_with_engine(small, seed=3, steps=4, noise_level=7, sampler="ddim")
    plain = upscale(*networks, torch.from_numpy(small).permute(0, 3, 1, 2) * 2 - 1, steps=4, level=7, seed=3)
    assert np.abs(ours - theirs).max() < 1e-4
    assert np.abs((plain.permute(0, 2, 3, 1).numpy() + 1) / 2 - theirs).max() < 1e-4


def test_the_autoencoder_draws_and_reads_its_code(networks: tuple[UNet2DConditionModel, AutoencoderKL]) -> None:
    _, vae = networks
    images = torch.from_numpy(large_images(heldout_scenes()[78:82])).permute(0, 3, 1, 2) * 2 - 1
    latents = encode_images(images)
    with torch.no_grad():
        read = vae.encode(images).latent_dist.mode()
        drawn, again = vae.decode(latents / SCALING_FACTOR).sample, vae.decode(read).sample
    for pictures, least in ((drawn, 40.0), (again, 39.0)):
        assert -10 * ((pictures - images) / 2).square().mean().log10() > least


def test_latents_are_averages_of_quarters() -> None:
    images = torch.rand(2, 3, 16, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = encode_images(images)
    assert latents.shape == (2, CHANNELS, 4, 2)
    assert torch.allclose(latents[:, :3] * 0.7, torch.nn.functional.avg_pool2d(images, 4), atol=1e-6)
    left, right = images[0, 1, 4:8, 4:6].mean(), images[0, 1, 4:8, 6:8].mean()
    assert latents[0, 4, 1, 1] * 0.3 == pytest.approx(float(left - right) / 2, abs=1e-6)


def test_windows_are_parts_of_the_whole_picture() -> None:
    rng = random.Random(3)
    scene = sample_single(rng)
    whole = render_window(scene, scale=SCALE, left=0, top=0, side=256)
    left, top = window_near_outline(scene, 16, rng)
    window = render_window(scene, scale=SCALE, left=SCALE * left, top=SCALE * top, side=64)
    assert np.array_equal(window, whole[:, SCALE * top : SCALE * top + 64, SCALE * left : SCALE * left + 64])
    assert np.array_equal(render_window(scene, scale=1, left=0, top=0, side=64), render([scene])[0])
    means = whole.reshape(3, 64, 4, 64, 4).mean((2, 4))
    assert np.abs(means - render([scene])[0]).max() < 0.1
