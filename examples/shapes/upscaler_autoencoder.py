"""Trains the autoencoder of the upscaler: 256x256 pixels to 64x64 latents of 12 channels, and back.

The code is given (upscaler_latents.py), so decoder and encoder are trained one after the other, in either order: the
decoder draws from latents with some noise, as a denoiser's are, the encoder predicts mean and variance of each latent.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from .autoencoder import STAGES, fit
from .progress import Progress
from .render import render_window
from .scenes import SIZE, load_heldout
from .upscaler_latents import CHANNELS, encode_images, outlines
from .upscaler_scenes import SCALE, Examples, choose_side, sample_scene
from .upscaler_start import start_decoder, start_encoder

CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (32, 32, 64),
    "layers_per_block": 1,
    "latent_channels": CHANNELS,
    "norm_num_groups": 8,
    "sample_size": SCALE * SIZE,
    "scaling_factor": 1.0,
    "mid_block_add_attention": False,
}
NOISE = 0.1
OUTLINE_WEIGHT = 6.0


def build_autoencoder(seed: int = 0) -> AutoencoderKL:
    """A decoder that interpolates and an encoder that averages: weights to start from."""
    torch.manual_seed(seed)
    vae = AutoencoderKL(**CONFIG)
    start_decoder(vae)
    start_encoder(vae)
    return vae


def drawing_loss(output: Tensor, target: Tensor) -> Tensor:
    """L1 + MSE of images [B, 3, H, W]; pixels near an outline count seven times."""
    edges = (target - F.avg_pool2d(target, 3, 1, 1, count_include_pad=False)).abs().amax(1, keepdim=True) > 0.02
    weight = 1 + OUTLINE_WEIGHT * F.max_pool2d(edges.float(), 5, 1, 2)
    error = output - target
    return (weight * (error.abs() + error * error)).mean() / weight.mean()


def train(
    work: Path,
    stage: str,
    *,
    minutes: float,
    steps: int | None = None,
    lr: float = 1e-3,
    device: str = "cpu",
    seed: int = 0,
) -> None:
    """Train the decoder or the encoder, or go on with it; the result is `work/vae` in diffusers format."""
    vae, progress = build_autoencoder(seed).to(device), Progress(f"upscaler {stage}", minutes=minutes, steps=steps)
    examples = Examples(load_heldout(), stock=0)

    def loss(rng: random.Random) -> Tensor:
        _, images = examples.sample(rng, choose_side(rng, progress.fraction))
        return _loss(vae, stage, images.to(device))

    fit(vae, work, stage, progress, lr, loss, lambda: psnr(vae, stage), seed)


def _loss(vae: AutoencoderKL, stage: str, images: Tensor) -> Tensor:
    latents = encode_images(images)
    with torch.autocast(vae.device.type, torch.bfloat16):
        if stage == "decoder":
            noise = NOISE * torch.rand(len(latents), 1, 1, 1) * torch.randn(latents.shape)
            return drawing_loss(vae.decode(latents + noise.to(latents.device)).sample.float(), images)
        posterior = vae.encode(images).latent_dist
    error, logvar = posterior.mean.float() - latents, posterior.logvar.float().clamp(-6, 4)
    weights = 1 + OUTLINE_WEIGHT * outlines(latents)
    fit = (weights * (error.abs() + error * error)).mean() / weights.mean()
    # The variance is fitted to the error but does not weigh it: flat cells, told exactly, would outweigh outlines.
    likelihood = 0.5 * (error.detach() ** 2 * torch.exp(-logvar) + logvar).mean()
    return fit + 0.01 * likelihood


@torch.no_grad()
def psnr(vae: AutoencoderKL, stage: str, count: int = 12) -> float:
    """Mean PSNR in dB of 256x256 pictures drawn from exact latents (decoder) or from encoded ones (encoder)."""
    rng, side = random.Random("upscaler validation"), SIZE * SCALE
    values = []
    for _ in range(count):
        scene = sample_scene(rng, frozenset())
        image = torch.from_numpy(render_window(scene, scale=SCALE, left=0, top=0, side=side))[None] * 2 - 1
        image = image.to(vae.device)
        latents = vae.encode(image).latent_dist.mode() if stage == "encoder" else encode_images(image)
        error = ((vae.decode(latents).sample.clamp(-1, 1) - image) / 2).square().mean()
        values.append(-10 * error.log10().item())
    return sum(values) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache/stepfuse/shapes-x4")
    parser.add_argument("--stage", choices=STAGES, required=True)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--steps", type=int, help="train by steps instead of minutes: exactly repeatable")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    train(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
