"""Tiny complete diffusers pipelines: tokenizers, text encoders, scheduler, autoencoder, U-Net, as folders."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.controlnet.pipeline_controlnet import StableDiffusionControlNetPipeline
from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_inpaint import StableDiffusionInpaintPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_upscale import StableDiffusionUpscalePipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl_img2img import (
    StableDiffusionXLImg2ImgPipeline,
)
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl_inpaint import (
    StableDiffusionXLInpaintPipeline,
)
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_pndm import PNDMScheduler
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from .networks import CONTROLNETS, DDPM, REFINER, SD, SD2, SDXL, UPSCALER, vae
from .random_weights import randomize

SCHEDULE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
MERGES = (("p", "h"), ("ph", "o"), ("o", "f</w>"), ("c", "a"), ("ca", "t</w>"), ("t", "o</w>"))


def tokenizer() -> CLIPTokenizer:
    """A byte-level CLIP tokenizer with a handful of merges; end of text is the largest id, as in CLIP's own."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    alphabet = [chr(b) for b in printable] + [chr(256 + i) for i in range(len(rest))]
    words = alphabet + [letter + "</w>" for letter in alphabet] + [a + b for a, b in MERGES]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    merges: Any = list(MERGES)  # pairs are what the class takes, whatever its annotation says
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)


def text_config(activation: str) -> CLIPTextConfig:
    """A small CLIP text encoder; eos_token_id 2 is what published configurations say, true or not."""
    vocabulary = tokenizer().get_vocab()
    return CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=128,
        num_hidden_layers=5,
        num_attention_heads=4,
        projection_dim=32,
        hidden_act=activation,
        max_position_embeddings=77,
        bos_token_id=vocabulary["<|startoftext|>"],
        eos_token_id=2,
        pad_token_id=1,
    )


def _sd(unet: dict[str, Any], activation: str, scheduler: Any, cls: Any = StableDiffusionPipeline, **more: Any) -> Any:
    return cls(
        vae=AutoencoderKL(**vae()),
        text_encoder=CLIPTextModel(text_config(activation)),
        tokenizer=tokenizer(),
        unet=UNet2DConditionModel(**unet),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,
        **more,
    )


def _sd15() -> Any:
    return _sd(SD, "quick_gelu", PNDMScheduler(**SCHEDULE, skip_prk_steps=True, set_alpha_to_one=False))


def _sd2_v() -> Any:
    scheduler = DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False, prediction_type="v_prediction")
    return _sd(SD2, "gelu", scheduler)


def _sdxl(cls: Any = StableDiffusionXLPipeline, **unet: Any) -> Any:
    scheduler: Any = EulerDiscreteScheduler(**SCHEDULE, timestep_spacing="leading")
    return cls(
        vae=AutoencoderKL(**vae(scaling_factor=0.13025)),
        text_encoder=CLIPTextModel(text_config("quick_gelu")),
        tokenizer=tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(text_config("gelu")),
        tokenizer_2=tokenizer(),
        unet=UNet2DConditionModel(**SDXL | unet),
        scheduler=scheduler,
        add_watermarker=False,
    )


def _sd15_controlnet() -> Any:
    scheduler = PNDMScheduler(**SCHEDULE, skip_prk_steps=True, set_alpha_to_one=False)
    control = ControlNetModel(**CONTROLNETS["sd15"])
    return _sd(SD, "quick_gelu", scheduler, StableDiffusionControlNetPipeline, controlnet=control)


def _sd15_inpaint9() -> Any:
    scheduler = PNDMScheduler(**SCHEDULE, skip_prk_steps=True, set_alpha_to_one=False)
    return _sd(SD | {"in_channels": 9}, "quick_gelu", scheduler, StableDiffusionInpaintPipeline)


def _refiner() -> Any:
    scheduler: Any = EulerDiscreteScheduler(**SCHEDULE, timestep_spacing="leading")
    absent: Any = None
    return StableDiffusionXLImg2ImgPipeline(
        vae=AutoencoderKL(**vae(scaling_factor=0.13025)),
        text_encoder=absent,
        tokenizer=absent,
        text_encoder_2=CLIPTextModelWithProjection(text_config("gelu")),
        tokenizer_2=tokenizer(),
        unet=UNet2DConditionModel(**REFINER),
        scheduler=scheduler,
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )


def _x4_upscaler() -> Any:
    betas: Any = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "scaled_linear"}
    return StableDiffusionUpscalePipeline(
        vae=AutoencoderKL(**vae(widths=(8, 16, 16), scaling_factor=0.08333)),
        text_encoder=CLIPTextModel(text_config("gelu")),
        tokenizer=tokenizer(),
        unet=UNet2DConditionModel(**UPSCALER),
        low_res_scheduler=DDPMScheduler(**betas),
        scheduler=DDIMScheduler(**betas, clip_sample=False, set_alpha_to_one=False, prediction_type="v_prediction"),
    )


def _ddpm() -> Any:
    return DDPMPipeline(unet=UNet2DModel(**DDPM), scheduler=DDPMScheduler(num_train_timesteps=8, beta_end=0.4))


PIPELINES = {
    "sd15": _sd15,
    "sd2_v": _sd2_v,
    "sdxl": _sdxl,
    "sd15_controlnet": _sd15_controlnet,
    "sd15_inpaint9": _sd15_inpaint9,
    "sdxl_inpaint9": lambda: _sdxl(StableDiffusionXLInpaintPipeline, in_channels=9),
    "sdxl_refiner": _refiner,
    "x4_upscaler": _x4_upscaler,
    "ddpm": _ddpm,
}


def build_pipeline(name: str, folder: Path) -> None:
    """Build, randomise and save the pipeline `name` of PIPELINES in float32 (values that float16 holds exactly)."""
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    pipeline = PIPELINES[name]()
    for component, module in pipeline.components.items():
        if isinstance(module, torch.nn.Module):
            randomize(module, f"{name}.{component}")
    pipeline.save_pretrained(folder)
