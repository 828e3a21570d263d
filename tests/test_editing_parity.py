"""Image to image, inpainting, enlarging and base with refiner against diffusers' pipelines in float32: same checkpoint
folder, pictures and seeds (a generator of the seed, drawn from in the same order), compared as final latents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from stepfuse import Engine
from stepfuse.engine.sampling.noise import philox_normal

LATENTS = 1e-4  # relative L2 of the final latents
WIDTH, HEIGHT = 48, 32
PROMPT = "a photo of a cat"
COMMON: dict[str, Any] = {"negative_prompt": "blurry", "guidance_scale": 4.0}
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "heun": "HeunDiscreteScheduler",
}

Pipeline = Callable[[str], Path]
Ours = Callable[[str], Engine]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def picture(seed: int = 0, width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def mask() -> Image.Image:
    """Grey values around the threshold, in blocks that are no whole latent sites."""
    rng = np.random.default_rng(3)
    blocks = rng.integers(90, 166, (HEIGHT // 4, WIDTH // 4), dtype=np.uint8)
    return Image.fromarray(blocks.repeat(4, 0).repeat(4, 1))


def generators(seed: int, n: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + i) for i in range(n)]


def theirs(folder: Path, pipeline: str, sampler: str | None = None) -> Any:
    made = getattr(diffusers, pipeline).from_pretrained(folder, torch_dtype=torch.float32)
    made.set_progress_bar_config(disable=True)
    if sampler is not None:
        made.scheduler = getattr(diffusers, SCHEDULERS[sampler]).from_config(made.scheduler.config)
    return made


@pytest.fixture(scope="module")
def ours(reference_pipeline: Pipeline) -> Iterator[Ours]:
    engines: dict[str, Engine] = {}

    def get(name: str) -> Engine:
        if name not in engines:
            engines[name] = Engine.load(reference_pipeline(name), device="cpu")
        return engines[name]

    yield get
    for engine in engines.values():
        engine.close()


@pytest.mark.parametrize(
    ("name", "pipeline"),
    [("sd15", "StableDiffusionImg2ImgPipeline"), ("sdxl", "StableDiffusionXLImg2ImgPipeline"),
     ("sdxl_refiner", "StableDiffusionXLImg2ImgPipeline")],
)  # fmt: skip
@pytest.mark.parametrize(("sampler", "strength"), [("ddim", 1.0), ("euler", 0.6), ("dpmpp_2m", 0.75), ("heun", 0.5)])
def test_image_to_image(
    ours: Ours, reference_pipeline: Pipeline, name: str, pipeline: str, sampler: str, strength: float
) -> None:
    pictures = [picture(1), picture(2)]
    peer = theirs(reference_pipeline(name), pipeline, sampler)
    expected = peer(
        [PROMPT] * 2, image=pictures, strength=strength, num_inference_steps=6, generator=generators(5, 2),
        negative_prompt=["blurry"] * 2, guidance_scale=4.0, output_type="latent",
    ).images  # fmt: skip
    found = ours(name).generate(
        PROMPT, image=pictures, strength=strength, steps=6, n=2, seed=5, sampler=sampler, output="latent", **COMMON
    )
    assert relative(found.latents, expected) <= LATENTS


@pytest.mark.parametrize(
    ("name", "pipeline"),
    [("sd15", "StableDiffusionInpaintPipeline"), ("sdxl", "StableDiffusionXLInpaintPipeline"),
     ("sd15_inpaint9", "StableDiffusionInpaintPipeline"),
     ("sdxl_inpaint9", "StableDiffusionXLInpaintPipeline")],
)  # fmt: skip
@pytest.mark.parametrize(("sampler", "strength"), [("ddim", 1.0), ("euler", 0.7), ("dpmpp_2m", 1.0)])
def test_inpainting(
    ours: Ours, reference_pipeline: Pipeline, name: str, pipeline: str, sampler: str, strength: float
) -> None:
    peer = theirs(reference_pipeline(name), pipeline, sampler)
    expected = peer(
        PROMPT, image=picture(), mask_image=mask(), strength=strength, num_inference_steps=5, width=WIDTH,
        height=HEIGHT, generator=generators(7, 1), output_type="latent", **COMMON,
    ).images  # fmt: skip
    found = ours(name).generate(
        PROMPT, image=picture(), mask=mask(), strength=strength, steps=5, seed=7, sampler=sampler, output="latent",
        **COMMON,
    )  # fmt: skip
    assert relative(found.latents, expected) <= LATENTS


@pytest.mark.parametrize("level", [0, 20, 350])
def test_enlarging(ours: Ours, reference_pipeline: Pipeline, level: int) -> None:
    peer = theirs(reference_pipeline("x4_upscaler"), "StableDiffusionUpscalePipeline")
    small = picture(4, 20, 12)
    expected = peer(
        PROMPT, image=small, noise_level=level, num_inference_steps=4, generator=torch.Generator().manual_seed(3),
        output_type="np", **COMMON,
    ).images  # fmt: skip
    found = ours("x4_upscaler").generate(PROMPT, image=small, noise_level=level, steps=4, seed=3, output="np", **COMMON)
    assert found.images.shape == (1, 48, 80, 3)
    assert np.abs(found.images - expected).max() <= 1e-4


@pytest.mark.parametrize("sampler", ["euler", "ddim", "dpmpp_2m"])
def test_base_then_refiner(ours: Ours, reference_pipeline: Pipeline, sampler: str) -> None:
    base = theirs(reference_pipeline("sdxl"), "StableDiffusionXLPipeline", sampler)
    refiner = theirs(reference_pipeline("sdxl_refiner"), "StableDiffusionXLImg2ImgPipeline", sampler)
    between = base(
        PROMPT, width=WIDTH, height=HEIGHT, num_inference_steps=7, denoising_end=0.6, output_type="latent",
        generator=generators(2, 1), **COMMON,
    ).images  # fmt: skip
    expected = refiner(
        PROMPT, image=between, num_inference_steps=7, denoising_start=0.6, output_type="latent", **COMMON
    ).images
    options = {"steps": 7, "sampler": sampler, "output": "latent", "width": WIDTH, "height": HEIGHT, **COMMON}
    middle = ours("sdxl").generate(PROMPT, denoising_end=0.6, seed=2, **options)
    assert relative(middle.latents, between) <= LATENTS
    found = ours("sdxl_refiner").generate(PROMPT, latents=middle.latents, denoising_start=0.6, **options)
    assert relative(found.latents, expected) <= LATENTS


def test_repaint(ours: Ours, reference_pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a step per training step: diffusers goes back up too far where steps are strides (tests/test_repaint.py)."""
    folder, steps, jump, times, seed = reference_pipeline("ddpm"), 8, 3, 2, 6
    scheduler = diffusers.RePaintScheduler.from_pretrained(folder, subfolder="scheduler")
    peer = diffusers.RePaintPipeline(unet=theirs(folder, "DDPMPipeline").unet, scheduler=scheduler)
    peer.set_progress_bar_config(disable=True)
    rng = np.random.default_rng(5)
    image = rng.random((16, 16, 3), dtype=np.float32)
    new = (rng.random((16, 16)) < 0.5).astype(np.float32)
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None] * 2 - 1
    fixed = torch.randn((1, 3, 16, 16), generator=torch.Generator().manual_seed(seed))
    known = 1 - torch.from_numpy(new)[None, None]
    noises = repaint_noises(scheduler, steps, jump, times, seed, fixed, known)
    monkeypatch.setattr(diffusers.schedulers.scheduling_repaint, "randn_tensor", lambda *_, **__: next(noises))
    expected = peer(
        image=pixels, mask_image=known, num_inference_steps=steps, jump_length=jump, jump_n_sample=times, eta=0.0,
        generator=torch.Generator().manual_seed(seed), output_type="np",
    ).images  # fmt: skip
    assert next(noises, None) is None, "every noise was used"
    found = ours("ddpm").generate(
        None, image=image, mask=new, resample=(jump, times), steps=steps, sampler="ddim", seed=seed, output="np"
    )
    assert np.abs(found.images - expected).max() <= LATENTS


def repaint_noises(
    scheduler: Any, steps: int, jump: int, times: int, seed: int, fixed: torch.Tensor, known: torch.Tensor
) -> Iterator[torch.Tensor]:
    """What diffusers has to draw to do what one noise per jump, and one for the known image, do.

    A jump of `jump` steps up draws its whole noise at once, so that theirs is 0 in all but the first of them; in known
    pixels it is what takes the fixed noise of one level to that of the other.
    """
    scheduler.set_timesteps(steps, jump, times)
    bar, visited, evaluations = scheduler.alphas_cumprod, scheduler.timesteps.tolist(), 0
    before = visited[0] + 1
    for i, t in enumerate(visited):
        if t < before:
            yield fixed
            evaluations += 1
        elif visited[i - 1] < visited[max(i - 2, 0)] or i == 1:  # the first step up from `before`
            keeps = torch.sqrt(1 - scheduler.betas[before : before + jump])
            below = torch.sqrt(1 - bar[before - 1]) if before else torch.zeros(())
            above, ratio = torch.sqrt(1 - bar[before + jump - 1]), keeps.prod()
            drawn = philox_normal(torch.tensor([seed]), torch.tensor([evaluations - 1]), list(fixed.shape[1:]))
            total = torch.where(
                known == 0, torch.sqrt(above**2 - (ratio * below) ** 2) * drawn, (above - ratio * below) * fixed
            )
            yield total / (torch.sqrt(scheduler.betas[before]) * keeps[1:].prod())
        else:
            yield torch.zeros_like(fixed)
        before = t
