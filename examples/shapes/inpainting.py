"""Trains the inpainting model of `shapes`: a U-Net that sees the mask and what it leaves of the picture.

    python -m stepfuse.examples.shapes.inpainting --minutes 30

The U-Net and its text encoder are frozen; its new entry and a LoRA are trained (`inpainting_weights.py`). The loss
is that of `denoiser.py`; the picture beside the latents goes through the encoder, as it will when an engine edits.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from .averaging import run
from .denoiser import DROP
from .diffusion import object_weight, velocity_loss
from .inpainting_masks import sample_mask
from .inpainting_weights import DIFFERENCE, open_unet, save_difference
from .latents import CELL, encode_scenes
from .package import SHIPPED as SHAPES
from .progress import Progress, load_checkpoint
from .render import render
from .scenes import Combination, caption, load_heldout, sample_pair, sample_single
from .text_encoder import Words
from .tokenizer import build_tokenizer
from .tuning import Tuner

PAIRS = 0.65  # of the scenes


def sample_batch(
    rng: random.Random, batch: int, heldout: frozenset[Combination]
) -> tuple[Tensor, Tensor, Tensor, list[str]]:
    """Fresh scenes: latents [B, 8, 8, 8], pictures [B, 3, 64, 64] in 0..1, masks [B, 1, 64, 64], captions."""
    scenes = [sample_pair(rng, heldout) if rng.random() < PAIRS else sample_single(rng) for _ in range(batch)]
    masks = np.stack([sample_mask(rng, scene) for scene in scenes])[:, None]
    captions = ["" if rng.random() < DROP else caption(scene, rng) for scene in scenes]
    return torch.from_numpy(encode_scenes(scenes)), torch.from_numpy(render(scenes)), torch.from_numpy(masks), captions


@torch.no_grad()
def beside(vae: AutoencoderKL, pictures: Tensor, masks: Tensor) -> Tensor:
    """What the U-Net sees beside the latents, [B, 9, 8, 8]: mask, and latents of the picture with gray under it.

    Of every site the mask's upper left pixel counts, as in diffusers.
    """
    left = vae.encode((2 * pictures - 1) * (1 - masks)).latent_dist.sample() * vae.config.scaling_factor
    return torch.cat([masks[:, :, ::CELL, ::CELL], left], 1)


def build_tuner(lr: float, device: str) -> Tuner:
    """The U-Net with a new entry and a LoRA, which are trained, beside the frozen text encoder."""
    return Tuner(lambda unet, text: open_unet(unet), lr, device, warmup=50, weight_decay=0.01, fused=True)


def load_encoder(device: str) -> AutoencoderKL:
    """The autoencoder of `shapes`, frozen."""
    return AutoencoderKL.from_pretrained(SHAPES / "vae", torch_dtype=torch.float32).requires_grad_(False).to(device)


def painting_loss(
    tuner: Tuner, vae: AutoencoderKL, latents: Tensor, pictures: Tensor, masks: Tensor, ids: Tensor, weight: float
) -> Tensor:
    """See `velocity_loss`; draws timesteps, noise, and latents of what the masks leave."""
    latents, pictures, masks, ids = (t.to(tuner.device) for t in (latents, pictures, masks, ids))

    def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
        seen = torch.cat([noisy, beside(vae, pictures, masks)], 1)
        return tuner.unet(seen, timesteps, tuner.text(ids)[0]).sample

    return velocity_loss(predict, latents, weight)


def train(work: Path, *, minutes: float, steps: int | None, batch: int, lr: float, device: str, seed: int = 0) -> Path:
    """Train (or go on training); returns the checkpoint, which `package` reads."""
    heldout = load_heldout()
    torch.manual_seed(seed)
    words = Words(build_tokenizer(work / "tokenizer"))
    tuner, vae = build_tuner(lr, device), load_encoder(device)
    progress = Progress("inpainting", minutes=minutes, steps=steps)

    def loss(rng: random.Random) -> Tensor:
        *examples, captions = sample_batch(rng, batch, heldout)
        return painting_loss(tuner, vae, *examples, words(captions), object_weight(progress.fraction))

    run(tuner.optimizer, progress, path := work / "inpainting.pt", loss, seed=seed)
    return path


def package(checkpoint: Path, target: Path = DIFFERENCE) -> int:
    """Write the averaged difference in float16; returns its bytes. RuntimeError for a checkpoint that is not there."""
    state = load_checkpoint(checkpoint)
    if state is None:
        raise RuntimeError(f"{checkpoint}: no such checkpoint; train first")
    return save_difference(state["average"], target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache/stepfuse/shapes-inpainting")
    parser.add_argument("--target", type=Path, default=DIFFERENCE, help="where the trained difference goes")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--steps", type=int, help="train by steps instead of minutes: exactly repeatable")
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = vars(parser.parse_args())
    target = args.pop("target")
    print(f"{target}: {package(train(**args), target) / 1e6:.2f} MB", flush=True)


if __name__ == "__main__":
    main()
