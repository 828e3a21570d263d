"""Small published structures, recorded in seconds (two levels instead of four), and the export command."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_pndm import PNDMScheduler
from torch import nn
from transformers import CLIPTextModelWithProjection

from stepfuse import cli

from . import pipelines
from .networks import CONTROL, CROSS_DOWN, CROSS_UP, DOWN, SD, SD2, SDXL, UP, UPSCALER, vae
from .random_weights import randomize

TWO_LEVELS = {"down_block_types": (CROSS_DOWN, DOWN), "up_block_types": (UP, CROSS_UP)}
SMALL_SD = SD | TWO_LEVELS | {"block_out_channels": (40, 80)}
SMALL_SD2 = SD2 | TWO_LEVELS | {"block_out_channels": (64, 128), "attention_head_dim": (1, 2)}
SMALL_SDXL = SDXL | {
    "down_block_types": (DOWN, CROSS_DOWN),
    "up_block_types": (CROSS_UP, UP),
    "block_out_channels": (32, 64),
    "transformer_layers_per_block": (1, 2),
    "attention_head_dim": (1, 2),
}
SMALL_UPSCALER = UPSCALER | {
    "down_block_types": (DOWN, CROSS_DOWN),
    "up_block_types": (CROSS_UP, UP),
    "block_out_channels": (32, 64),
    "only_cross_attention": (True, False),
}
SMALL_REFINER = SMALL_SDXL | {"projection_class_embeddings_input_dim": 5 * 8 + 32, "cross_attention_dim": 32}
"""One size id less than SDXL: the aesthetic score takes the place of the target size."""
SMALL_CONTROL = {k: v for k, v in SMALL_SD.items() if k not in ("sample_size", "up_block_types")} | CONTROL
SMALL_XL_CONTROL = {k: v for k, v in SMALL_SDXL.items() if k not in ("sample_size", "up_block_types")} | CONTROL


def _module(cls: str, config: dict[str, Any]) -> nn.Module:
    return getattr(diffusers, cls)(**config)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "sd2": lambda: _module("UNet2DConditionModel", SMALL_SD2),
    "sdxl": lambda: _module("UNet2DConditionModel", SMALL_SDXL),
    "inpaint9": lambda: _module("UNet2DConditionModel", SMALL_SD | {"in_channels": 9}),
    "sdxl_controlnet": lambda: ControlNetModel(**SMALL_XL_CONTROL),
    "controlnet": lambda: ControlNetModel(**SMALL_CONTROL),
    "vae": lambda: _module("AutoencoderKL", vae(widths=(8, 16), force_upcast=False)),
    "text_projection": lambda: CLIPTextModelWithProjection(pipelines.text_config("gelu")),
}


def _saved(pipeline: Any, folder: Path) -> Any:
    for component, module in pipeline.components.items():
        if isinstance(module, torch.nn.Module):
            randomize(module, f"export.{component}")
    pipeline.save_pretrained(folder)
    return pipeline


def build_network(name: str, folder: Path) -> nn.Module:
    """Build, randomise and save one of NETWORKS in float32; returns it in float64."""
    module: Any = NETWORKS[name]()
    randomize(module, f"export.{name}")
    module.save_pretrained(folder)
    return module.double().eval()


def build_pipeline(folder: Path) -> Any:
    """A complete Stable Diffusion pipeline of two levels, saved in float32; returns it."""
    scheduler = PNDMScheduler(**pipelines.SCHEDULE, skip_prk_steps=True, set_alpha_to_one=False)
    pipeline = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(**vae()),
        text_encoder=pipelines.CLIPTextModel(pipelines.text_config("quick_gelu")),
        tokenizer=pipelines.tokenizer(),
        unet=diffusers.UNet2DConditionModel(**SMALL_SD),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return _saved(pipeline, folder)


def build_refiner(folder: Path) -> Any:
    """A Stable Diffusion XL refiner of two levels, without the first text encoder; saved in float32."""
    scheduler: Any = EulerDiscreteScheduler(**pipelines.SCHEDULE, timestep_spacing="leading")
    parts = {
        "vae": diffusers.AutoencoderKL(**vae(widths=(8, 16))),
        "text_encoder": None,
        "tokenizer": None,
        "text_encoder_2": CLIPTextModelWithProjection(pipelines.text_config("gelu")),
        "tokenizer_2": pipelines.tokenizer(),
        "unet": diffusers.UNet2DConditionModel(**SMALL_REFINER),
        "scheduler": scheduler,
    }
    refiner = diffusers.StableDiffusionXLImg2ImgPipeline(**parts, requires_aesthetics_score=True, add_watermarker=False)
    return _saved(refiner, folder)


def build_upscaler(folder: Path) -> Any:
    """A Stable Diffusion x4 upscaler of two levels, its autoencoder of three; saved in float32."""
    upscaler = diffusers.StableDiffusionUpscalePipeline(
        vae=diffusers.AutoencoderKL(**vae(widths=(8, 16, 16), scaling_factor=0.08333)),
        text_encoder=pipelines.CLIPTextModel(pipelines.text_config("quick_gelu")),
        tokenizer=pipelines.tokenizer(),
        unet=diffusers.UNet2DConditionModel(**SMALL_UPSCALER),
        low_res_scheduler=DDPMScheduler(**pipelines.SCHEDULE),
        scheduler=DDIMScheduler(**pipelines.SCHEDULE, prediction_type="v_prediction"),
    )
    return _saved(upscaler, folder)


def invoke(*arguments: str) -> int:
    """Exit code of `stepfuse export ARGUMENTS`."""
    before, sys.argv = sys.argv, ["stepfuse", "export", *arguments]
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main()
    finally:
        sys.argv = before
    return int(ended.value.code or 0)
