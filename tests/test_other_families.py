"""Families beside SD and SDXL through the whole engine: latent consistency, pixels, and those that need an image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.schedulers import scheduling_ddpm
from reference.networks import UNETS, vae
from reference.pipelines import SCHEDULE, text_config, tokenizer
from reference.random_weights import randomize
from transformers import CLIPTextModel

from stepfuse import Engine
from stepfuse.engine.errors import CheckpointError, RequestError
from stepfuse.engine.sampling.noise import initial_noise, philox_normal

LATENTS = 1e-4
PROMPT = "a photo of a cat"


def network(name: str, tag: str, **changes: Any) -> torch.nn.Module:
    cls, config = UNETS[name]
    return randomize_module(getattr(diffusers, cls)(**config | changes), tag)


def randomize_module(module: torch.nn.Module, tag: str) -> torch.nn.Module:
    randomize(module, tag)
    return module


def latent_pipeline(folder: Path, cls: type, unet: torch.nn.Module, scheduler: Any, **more: Any) -> Any:
    made = cls(
        vae=randomize_module(diffusers.AutoencoderKL(**vae()), "vae"),
        text_encoder=randomize_module(CLIPTextModel(text_config("quick_gelu")), "text"),
        tokenizer=tokenizer(),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **more,
    )
    made.save_pretrained(folder)
    made.set_progress_bar_config(disable=True)
    return made


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_guidance_embedded_consistency_model_equals_diffusers(tmp_path: Path) -> None:
    scheduler = diffusers.LCMScheduler(**SCHEDULE)
    theirs = latent_pipeline(
        tmp_path, diffusers.LatentConsistencyModelPipeline, network("lcm", "lcm"), scheduler, image_encoder=None
    )
    with Engine.load(tmp_path, device="cpu") as engine:
        found = engine.generate(PROMPT, steps=1, seed=3, guidance_scale=5.0, output="latent", width=64, height=64)
        two = engine.generate(PROMPT, steps=4, seed=3, n=2, output="latent", width=64, height=64)
        assert engine.generate(PROMPT, seed=3, output="latent", width=64, height=64).settings["steps"] == 4
    start = torch.randn((1, 4, *found.latents.shape[2:]), generator=torch.Generator().manual_seed(3))
    expected = theirs(
        PROMPT, num_inference_steps=1, guidance_scale=5.0, latents=start, output_type="latent", width=64, height=64
    ).images
    assert relative(found.latents, expected) <= LATENTS
    assert torch.isfinite(two.latents).all()


def test_pixel_diffusion_equals_diffusers(tmp_path: Path) -> None:
    theirs = diffusers.DDIMPipeline(network("ddpm", "ddpm"), diffusers.DDIMScheduler(clip_sample=True))
    theirs.save_pretrained(tmp_path)
    theirs.set_progress_bar_config(disable=True)
    with Engine.load(tmp_path, device="cpu") as engine:
        found = engine.generate(seed=5, n=2, steps=4, output="np")
        with pytest.raises(RequestError, match="takes no text; leave it out"):
            engine.generate(PROMPT)
        with pytest.raises(RequestError, match="is unconditional"):
            engine.generate(class_labels=1, steps=1)
    assert found.images.shape == (2, 16, 16, 3)
    generators = [torch.Generator().manual_seed(5 + i) for i in range(2)]
    expected = theirs(batch_size=2, generator=generators, num_inference_steps=4, output_type="np").images
    assert abs(found.images - expected).max() <= 1e-4


def test_class_conditional_pixels_depend_on_the_class(tmp_path: Path) -> None:
    unet = network("adm", "adm", out_channels=3)
    pipeline = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler())
    pipeline.save_pretrained(tmp_path)
    with Engine.load(tmp_path, device="cpu") as engine:
        classes = engine.components.denoiser.config.class_dim
        both = engine.generate(seed=5, n=2, steps=3, class_labels=(0, classes - 1), output="pt")
        one = engine.generate(seed=6, steps=3, class_labels=classes - 1, output="pt")
        assert torch.allclose(both.images[1], one.images[0], atol=1e-5)
        other = engine.generate(seed=6, steps=3, class_labels=0, output="pt")
        assert not torch.allclose(other.images, one.images, atol=1e-3)
        for wrong in (None, classes, (0, 1)):
            with pytest.raises(RequestError, match=f"class numbers from 0 to {classes - 1}"):
                engine.generate(seed=6, steps=1, class_labels=wrong)


def test_learned_variance_equals_diffusers(tmp_path: Path) -> None:
    """The noise is ours: the reference steps get the noise that the engine's rows draw."""
    unet, steps = network("ddpm", "learned", out_channels=6), 5
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range", clip_sample=True)
    diffusers.DDPMPipeline(unet, scheduler).save_pretrained(tmp_path)
    with Engine.load(tmp_path, device="cpu") as engine:
        found = engine.generate(seed=5, steps=steps, output="latent").latents
        ignored = engine.generate(seed=5, steps=steps, sampler="ddim", output="latent").latents
    x = initial_noise(5, found.shape[1:])
    scheduler.set_timesteps(steps)
    seed = torch.tensor([5])
    drawn = [philox_normal(seed, torch.tensor([update]), list(x.shape[1:])) for update in range(steps)]
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        for noise, t in zip(drawn, scheduler.timesteps, strict=True):
            patch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, noise=noise, **__: noise)
            x = scheduler.step(unet(x, t).sample, int(t), x).prev_sample
    assert relative(found, x) <= LATENTS
    assert relative(ignored, x) > 100 * LATENTS


def test_learned_variance_needs_a_network_that_predicts_one(tmp_path: Path) -> None:
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range")
    diffusers.DDPMPipeline(network("ddpm", "plain"), scheduler).save_pretrained(tmp_path)
    with Engine.load(tmp_path, device="cpu") as engine:
        with pytest.raises(CheckpointError, match="ask for a learned variance, but the denoiser predicts 3 channels"):
            engine.generate(seed=1, steps=2)
        assert engine.generate(seed=1, steps=2, sampler="ddim").images


def test_other_numbers_of_channels_are_refused(tmp_path: Path) -> None:
    diffusers.DDPMPipeline(network("ddpm", "odd", out_channels=5), diffusers.DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="the images have 3 channels, the denoiser predicts 5; expected 3, or 6"):
        Engine.load(tmp_path, device="cpu")


def test_inpainting_model_says_that_it_needs_an_image(tmp_path: Path) -> None:
    scheduler = diffusers.DDIMScheduler(**SCHEDULE)
    unet = network("sd15_inpaint9", "inpaint")
    latent_pipeline(tmp_path, diffusers.StableDiffusionInpaintPipeline, unet, scheduler, image_encoder=None)
    with Engine.load(tmp_path, device="cpu") as engine, pytest.raises(RequestError, match="needs an image and a mask"):
        engine.generate(PROMPT)


def test_text_encoder_of_another_model_is_refused(tmp_path: Path) -> None:
    unet = network("sd15", "wide", cross_attention_dim=48)
    latent_pipeline(
        tmp_path, diffusers.StableDiffusionPipeline, unet, diffusers.DDIMScheduler(**SCHEDULE), image_encoder=None
    )
    with pytest.raises(CheckpointError, match="text encoders give 32 features, the denoiser takes 48"):
        Engine.load(tmp_path, device="cpu")
