"""Whole pipelines against diffusers in float32: same checkpoint folder, prompt and noise, compared as final latents."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

from stepfuse import Engine

LATENTS = 1e-4  # relative L2 of the final latents
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
}
SIZE = {"width": 96, "height": 64}
PROMPT, NEGATIVE = "a photo of a cat", "blurry"

Pipeline = Callable[[str], Path]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module")
def pair(reference_pipeline: Pipeline):
    """name -> (our engine, diffusers' pipeline) of one folder, both float32."""
    made: dict[str, tuple[Engine, diffusers.DiffusionPipeline]] = {}

    def get(name: str) -> tuple[Engine, diffusers.DiffusionPipeline]:
        if name not in made:
            folder = reference_pipeline(name)
            theirs = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
            theirs.set_progress_bar_config(disable=True)
            if not hasattr(theirs.text_encoder, "text_model"):  # clip_skip of diffusers expects the older nesting
                object.__setattr__(theirs.text_encoder, "text_model", theirs.text_encoder)
            made[name] = (Engine.load(folder, device="cpu"), theirs)
        return made[name]

    yield get
    for engine, _ in made.values():
        engine.close()


def noise(engine: Engine, n: int, seed: int = 5) -> torch.Tensor:
    scale = engine.components.scale
    shape = (1, engine.components.channels, SIZE["height"] // scale, SIZE["width"] // scale)
    return torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(seed + i)) for i in range(n)])


@pytest.mark.parametrize("negative", [NEGATIVE, None, ""])
@pytest.mark.parametrize("sampler", SCHEDULERS)
@pytest.mark.parametrize("name", ["sd15", "sd2_v", "sdxl"])
def test_final_latents_equal_diffusers(pair, name: str, sampler: str, negative: str | None) -> None:
    engine, theirs = pair(name)
    scheduler = getattr(diffusers, SCHEDULERS[sampler])
    theirs.scheduler = scheduler.from_config(theirs.scheduler.config)
    options = {"guidance_scale": 6.0, **SIZE}
    expected = theirs(
        PROMPT, negative_prompt=negative, num_inference_steps=5, num_images_per_prompt=2, output_type="latent",
        latents=noise(engine, 2), **options,
    ).images  # fmt: skip
    found = engine.generate(
        PROMPT, negative_prompt=negative, steps=5, n=2, seed=5, output="latent", sampler=sampler, **options
    )
    assert found.images is None
    assert relative(found.latents, expected) <= LATENTS


@pytest.mark.parametrize("name", ["sd15", "sd2_v", "sdxl"])
def test_the_checkpoints_own_scheduler_and_images_equal_diffusers(
    pair, reference_pipeline: Pipeline, name: str
) -> None:
    engine, theirs = pair(name)
    theirs.scheduler = type(theirs.scheduler).from_config(theirs.scheduler.config)
    fresh = diffusers.DiffusionPipeline.from_pretrained(reference_pipeline(name), torch_dtype=torch.float32)
    fresh.set_progress_bar_config(disable=True)
    options = {"guidance_scale": 4.0, **SIZE}
    expected = fresh(PROMPT, num_inference_steps=4, latents=noise(engine, 1, 9), output_type="np", **options).images
    found = engine.generate(PROMPT, steps=4, seed=9, output="np", **options)
    assert np.abs(found.images - expected).max() <= 2 / 255


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
@pytest.mark.parametrize(
    ("ours", "theirs_options"),
    [
        pytest.param({"clip_skip": 1}, {"clip_skip": 1}, id="clip_skip"),
        pytest.param({"guidance_rescale": 0.7}, {"guidance_rescale": 0.7}, id="guidance_rescale"),
        pytest.param({"guidance_scale": 1.0}, {"guidance_scale": 1.0}, id="no guidance"),
    ],
)
def test_options_equal_diffusers(pair, name: str, ours: dict, theirs_options: dict) -> None:
    engine, theirs = pair(name)
    theirs.scheduler = diffusers.DDIMScheduler.from_config(theirs.scheduler.config)
    options = {"guidance_scale": 5.0, **SIZE}
    expected = theirs(
        PROMPT, num_inference_steps=4, latents=noise(engine, 1), output_type="latent", **options | theirs_options
    ).images
    found = engine.generate(PROMPT, steps=4, seed=5, sampler="ddim", output="latent", **options | ours)
    assert relative(found.latents, expected) <= LATENTS


def test_sdxl_takes_two_prompts_as_diffusers_does(pair) -> None:
    engine, theirs = pair("sdxl")
    theirs.scheduler = diffusers.EulerDiscreteScheduler.from_config(theirs.scheduler.config)
    prompts = {"prompt_2": "of a cat", "negative_prompt": "a", "negative_prompt_2": "photo"}
    expected = theirs(
        PROMPT, num_inference_steps=4, latents=noise(engine, 1), output_type="latent", **prompts, **SIZE
    ).images
    found = engine.generate(PROMPT, steps=4, seed=5, sampler="euler", output="latent", **prompts, **SIZE)
    assert relative(found.latents, expected) <= LATENTS


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_embeddings_of_the_user_equal_the_prompt(pair, name: str) -> None:
    engine, theirs = pair(name)
    texts = theirs.encode_prompt(PROMPT, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
    names = ["prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
    embeds = dict(zip(names, texts, strict=False))
    common = {"steps": 3, "seed": 1, "output": "latent", **SIZE}
    found = engine.generate(None, **embeds, **common)
    assert relative(found.latents, engine.generate(PROMPT, **common).latents) <= 1e-5


def test_builtin_model_opens_in_diffusers_and_gives_the_same_latents() -> None:
    from stepfuse.engine.families import builtin_folder

    theirs = diffusers.StableDiffusionPipeline.from_pretrained(builtin_folder("shapes"), torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    prompt = "a red circle above a blue square"
    with Engine.load("shapes", device="cpu") as engine:
        found = engine.generate(prompt, seed=7, steps=8, output="latent", sampler="ddim", guidance_scale=3.0)
        side = 64 // engine.components.scale
        start = torch.randn((1, engine.components.channels, side, side), generator=torch.Generator().manual_seed(7))
    theirs.scheduler = diffusers.DDIMScheduler.from_config(theirs.scheduler.config)
    expected = theirs(
        prompt, num_inference_steps=8, guidance_scale=3.0, latents=start, output_type="latent", width=64, height=64
    ).images
    assert relative(found.latents, expected) <= LATENTS
