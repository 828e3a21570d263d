"""Writes the trained upscaler in the layout of the Stable Diffusion x4 upscaler, without its text, in float16."""

from __future__ import annotations

import argparse
import json
import math
import shutil
from pathlib import Path

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel

from .package import ship
from .scenes import SIZE
from .upscaler import LOW_RES_SCHEDULER, MAX_LEVEL, SCHEDULER
from .upscaler_scenes import BUILTIN, SCALE

SHIPPED = BUILTIN / "shapes-x4"
DEFAULTS = {
    "steps": 4,
    "guidance_scale": 1.0,
    "sampler": "ddim",
    "noise_level": 0,
    "width": SCALE * SIZE,
    "height": SCALE * SIZE,
}
SCALING_FACTOR = 0.08333  # diffusers' StableDiffusionUpscalePipeline takes no other
FOLDER_LIMIT = 14 * 2**20
INDEX = {
    "_class_name": "StableDiffusionUpscalePipeline",
    "_diffusers_version": diffusers.__version__,
    "feature_extractor": [None, None],
    "low_res_scheduler": ["diffusers", "DDPMScheduler"],
    "max_noise_level": MAX_LEVEL,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": [None, None],
    "tokenizer": [None, None],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "watermarker": [None, None],
}


def package(work: Path, target: Path) -> int:
    """Assemble `target` from `work/unet` and `work/vae`; returns bytes written.

    The folder is complete before it takes the place of the old one. RuntimeError where it outgrows its limit.
    """
    fresh = target.with_name(target.name + ".fresh")
    shutil.rmtree(fresh, ignore_errors=True)
    UNet2DConditionModel.from_pretrained(work / "unet").half().save_pretrained(fresh / "unet")
    scaled(AutoencoderKL.from_pretrained(work / "vae")).half().save_pretrained(fresh / "vae")
    DDIMScheduler(**SCHEDULER).save_pretrained(fresh / "scheduler")
    DDPMScheduler(**LOW_RES_SCHEDULER).save_pretrained(fresh / "low_res_scheduler")
    (fresh / "model_index.json").write_text(json.dumps(INDEX, indent=2) + "\n")
    (fresh / "stepfuse.json").write_text(json.dumps(DEFAULTS, indent=2) + "\n")
    return ship(fresh, target, FOLDER_LIMIT)


@torch.no_grad()
def scaled(vae: AutoencoderKL) -> AutoencoderKL:
    """The same autoencoder with latents of its own larger by 1 / 0.08333, folded into its quant convolutions."""
    factor, channels = SCALING_FACTOR / vae.config.scaling_factor, vae.config.latent_channels
    vae.post_quant_conv.weight *= factor
    vae.quant_conv.weight[:channels] /= factor
    vae.quant_conv.bias[:channels] /= factor
    vae.quant_conv.bias[channels:] -= 2 * math.log(factor)  # log variances
    vae.register_to_config(scaling_factor=SCALING_FACTOR)
    return vae


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache/stepfuse/shapes-x4")
    parser.add_argument("--target", type=Path, default=SHIPPED)
    args = parser.parse_args()
    print(f"{args.target}: {package(args.work, args.target) / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
