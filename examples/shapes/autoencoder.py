"""Trains the autoencoder of `shapes`: 64x64 pixels to 8x8 latents of 8 channels, and back.

The code is given in closed form (latents.py), so decoder and encoder are trained one after the other, in either
order. The decoder draws from latents with some noise, as a denoiser's are, mostly in windows of 4x4 cells around
objects, then on whole images. The encoder predicts mean and variance of each latent from the pixels (Gaussian
likelihood).
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from .averaging import Averaged, run
from .latents import CELL, CHANNELS, GRID, encode_scenes
from .progress import Progress, load_checkpoint
from .render import render
from .scenes import SIZE, Scene, sample_pair, sample_single

SCALING_FACTOR = 0.18215
CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (32, 48, 64, 96),
    "layers_per_block": 1,
    "latent_channels": CHANNELS,
    "norm_num_groups": 8,
    "sample_size": SIZE,
    "scaling_factor": SCALING_FACTOR,
    "mid_block_add_attention": False,
}
WINDOW = 4  # cells
NOISE = 0.3
STAGES = ("decoder", "encoder")


def sample_scenes(rng: random.Random, count: int) -> list[Scene]:
    """Scenes for the autoencoder, half singles half pairs; combinations do not matter here."""
    return [sample_single(rng) if rng.random() < 0.5 else sample_pair(rng) for _ in range(count)]


def examples_of(scenes: list[Scene]) -> tuple[Tensor, Tensor]:
    """Images [B, 3, 64, 64] in -1..1 and latents [B, 8, 8, 8] of unit variance, float32."""
    return torch.from_numpy(render(scenes)) * 2 - 1, torch.from_numpy(encode_scenes(scenes))


def windows_of(scenes: list[Scene], rng: random.Random) -> tuple[Tensor, Tensor]:
    """The same of a window near an object of each scene: images [B, 3, 32, 32], latents [B, 8, 4, 4]."""
    pixels, codes = [], []
    for image, latents, scene in zip(*examples_of(scenes), scenes, strict=True):
        item = rng.choice(scene.items)
        left, top = (
            min(max(round((center + rng.uniform(-16, 16)) / CELL) - WINDOW // 2, 0), GRID - WINDOW)
            for center in (item.x, item.y)
        )
        codes.append(latents[:, top : top + WINDOW, left : left + WINDOW])
        rows, columns = (slice(CELL * a, CELL * (a + WINDOW)) for a in (top, left))
        pixels.append(image[:, rows, columns])
    return torch.stack(pixels), torch.stack(codes)


def drawing_loss(output: Tensor, target: Tensor) -> Tensor:
    """L1 + MSE; objects and their edges count more, for most pixels are background."""
    objects = ((target - target[:, :, :1, :1]).abs().sum(1, keepdim=True) > 0.05).float()
    edges = (target - F.avg_pool2d(target, 3, 1, 1, count_include_pad=False)).abs().sum(1, keepdim=True) > 0.05
    weight = 1 + 2 * objects + 4 * F.max_pool2d(edges.float(), 3, 1, 1)
    error = output - target
    return (weight * (error.abs() + error * error)).mean() / weight.mean()


def build_autoencoder(seed: int = 0) -> AutoencoderKL:
    """Random weights; the quant convolutions start with the latents' scale."""
    torch.manual_seed(seed)
    vae = AutoencoderKL(**CONFIG)
    with torch.no_grad():
        vae.quant_conv.weight[:CHANNELS] /= SCALING_FACTOR
        vae.post_quant_conv.weight *= SCALING_FACTOR
    return vae


def train(
    work: Path,
    stage: str,
    *,
    minutes: float,
    steps: int | None = None,
    batch: int,
    lr: float,
    device: str,
    seed: int = 0,
) -> None:
    """Train the decoder or the encoder, or go on with it; the result is `work/vae` in diffusers format."""
    vae, progress = build_autoencoder(seed).to(device), Progress(stage, minutes=minutes, steps=steps)

    def loss(rng: random.Random) -> Tensor:
        return _loss(vae, stage, rng, batch, progress.fraction)

    fit(vae, work, stage, progress, lr, loss, lambda: psnr(vae, stage), seed)


def fit(
    vae: AutoencoderKL,
    work: Path,
    stage: str,
    progress: Progress,
    lr: float,
    loss: Callable[[random.Random], Tensor],
    validate: Callable[[], float],
    seed: int,
) -> None:
    """Train one part of an autoencoder from its last checkpoint in `work`, beside the other part's; lr: peak.

    loss: see `averaging.run`; validate: in dB, printed whenever `work/vae` is written.
    """
    for name in STAGES:
        if state := load_checkpoint(work / f"{name}.pt"):
            part_of(vae, name).load_state_dict(state["trained"])
    named = part_of(vae, stage).named_parameters()
    optimizer = torch.optim.AdamW(named, lr=lr, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)

    def publish() -> None:
        vae.save_pretrained(work / "vae")
        print(f"{stage}: {validate():.2f} dB", flush=True)

    path = work / f"{stage}.pt"
    run(Averaged(optimizer, warmup=50, decay=0.0), progress, path, loss, publish, seed=seed, every=60.0)


def part_of(vae: AutoencoderKL, stage: str) -> torch.nn.ModuleList:
    if stage == "decoder":
        return torch.nn.ModuleList([vae.post_quant_conv, vae.decoder])
    return torch.nn.ModuleList([vae.encoder, vae.quant_conv])


def _loss(vae: AutoencoderKL, stage: str, rng: random.Random, batch: int, fraction: float) -> Tensor:
    whole = stage == "encoder" or fraction > 0.6
    scenes = sample_scenes(rng, batch // 3 if whole else batch)
    images, latents = examples_of(scenes) if whole else windows_of(scenes, rng)
    images, latents = images.to(vae.device), latents.to(vae.device)
    with torch.autocast(vae.device.type, torch.bfloat16):
        if stage == "decoder":
            noise = NOISE * torch.rand(len(latents), 1, 1, 1) * torch.randn(latents.shape)
            output = vae.decode((latents + noise.to(latents.device)) / SCALING_FACTOR).sample
            return drawing_loss(output.float(), images)
        posterior = vae.encode(images).latent_dist
    mean, logvar = SCALING_FACTOR * posterior.mean.float(), posterior.logvar.float().clamp(-6, 4)
    # The variance is of unscaled latents, of which the likelihood is that of the scaled ones but for a constant.
    error = ((mean - latents) / SCALING_FACTOR) ** 2
    return (0.5 * (error * torch.exp(-logvar) + logvar)).mean() + (mean - latents).abs().mean()


@torch.no_grad()
def psnr(vae: AutoencoderKL, stage: str, count: int = 64) -> float:
    """Mean PSNR in dB of pictures drawn from exact latents (decoder) or from encoded ones (encoder)."""
    images, latents = examples_of(sample_scenes(random.Random("validation"), count))
    images, latents = images.to(vae.device), latents.to(vae.device) / SCALING_FACTOR
    if stage == "encoder":
        latents = vae.encode(images).latent_dist.mode()
    errors = (((vae.decode(latents).sample.clamp(-1, 1) - images) / 2) ** 2).mean((1, 2, 3))
    return (-10 * errors.log10()).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache/stepfuse/shapes")
    parser.add_argument("--stage", choices=STAGES, required=True)
    parser.add_argument("--minutes", type=float, default=6)
    parser.add_argument("--steps", type=int, help="train by steps instead of minutes: exactly repeatable")
    parser.add_argument("--batch", type=int, default=32, help="windows a step; whole images are a third of it")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    train(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
