"""Trains and packages `shapes-silhouette`, the ControlNet of `shapes`: objects appear where a silhouette has them.

    python -m stepfuse.examples.shapes.controlnet --minutes 15

Zhang et al. 2023: a trainable copy of the U-Net's way down behind a small entry of the picture, whose outputs begin as
zeros; U-Net and text encoder are frozen. Data and loss as in `denoiser.py`, but the objects stand anywhere.
"""

from __future__ import annotations

import argparse
import random
import shutil
from pathlib import Path

import numpy as np
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor, nn

from .averaging import run
from .denoiser import DROP
from .diffusion import object_weight, velocity_loss
from .latents import encode_scenes
from .package import SHIPPED as SHAPES
from .package import ship
from .progress import Progress, load_checkpoint
from .scenes import Combination, caption, load_heldout
from .silhouettes import sample_free_scene, silhouette
from .text_encoder import Words
from .tokenizer import build_tokenizer
from .tuning import Tuner

SHIPPED = SHAPES.with_name("shapes-silhouette")
WIDTHS = (16, 32, 48, 64)  # of the entry: 64x64 pixels to 8x8 latents in three halvings
FILE_LIMIT = 6 * 10**6


def build_controlnet(unet: UNet2DConditionModel) -> ControlNetModel:
    """A ControlNet with the weights of the U-Net's way down; it changes nothing before it is trained."""
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=WIDTHS)
    # Zeros at the outputs suffice for that; a second layer of zeros in front would only delay the first gradients.
    torch.nn.init.normal_(net.controlnet_cond_embedding.conv_out.weight, std=0.02)
    return net


def sample_batch(rng: random.Random, batch: int, heldout: frozenset[Combination]) -> tuple[Tensor, Tensor, list[str]]:
    """Fresh scenes: latents [B, 8, 8, 8], silhouettes [B, 3, 64, 64], captions."""
    scenes = [sample_free_scene(rng, heldout) for _ in range(batch)]
    pictures = torch.from_numpy(np.stack([silhouette(scene) for scene in scenes])).permute(0, 3, 1, 2)
    captions = ["" if rng.random() < DROP else caption(scene, rng) for scene in scenes]
    return torch.from_numpy(encode_scenes(scenes)), pictures.contiguous(), captions


def open_control(unet: nn.Module, text: nn.Module) -> dict[str, nn.Parameter]:
    """Hang a ControlNet on the U-Net, as its `control`; what is trained, by its name there."""
    unet.control = build_controlnet(unet)
    return dict(unet.control.named_parameters())


def control_loss(tuner: Tuner, latents: Tensor, pictures: Tensor, ids: Tensor, weight: float) -> Tensor:
    """See `velocity_loss`; draws timesteps and noise."""
    pictures = pictures.to(tuner.device)

    def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
        inputs = noisy, timesteps, tuner.text(ids.to(tuner.device))[0]
        down, mid = tuner.unet.control(*inputs, controlnet_cond=pictures, return_dict=False)
        return tuner.unet(*inputs, down_block_additional_residuals=down, mid_block_additional_residual=mid).sample

    return velocity_loss(predict, latents.to(tuner.device), weight)


def train(work: Path, *, minutes: float, steps: int | None, batch: int, lr: float, device: str, seed: int = 0) -> Path:
    """Train (or go on training); returns the checkpoint, which `package` reads."""
    heldout = load_heldout()
    torch.manual_seed(seed)
    words = Words(build_tokenizer(work / "tokenizer"))
    tuner = Tuner(open_control, lr, device, warmup=50, weight_decay=0.01, fused=True)
    progress = Progress("controlnet", minutes=minutes, steps=steps)

    def loss(rng: random.Random) -> Tensor:
        latents, pictures, captions = sample_batch(rng, batch, heldout)
        return control_loss(tuner, latents, pictures, words(captions), object_weight(progress.fraction))

    run(tuner.optimizer, progress, path := work / "controlnet.pt", loss, seed=seed)
    return path


def package(checkpoint: Path, target: Path = SHIPPED) -> int:
    """Write the averaged weights as a float16 diffusers folder; returns bytes written.

    RuntimeError for a checkpoint that is not there, or where the weights outgrow their limit.
    """
    state = load_checkpoint(checkpoint)
    if state is None:
        raise RuntimeError(f"{checkpoint}: no such checkpoint; train first")
    net = build_controlnet(UNet2DConditionModel.from_pretrained(SHAPES / "unet", torch_dtype=torch.float32))
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.copy_(state["average"][name])
    fresh = target.with_name(target.name + ".fresh")
    shutil.rmtree(fresh, ignore_errors=True)
    net.half().save_pretrained(fresh)
    return ship(fresh, target, FILE_LIMIT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache/stepfuse/shapes-silhouette")
    parser.add_argument("--target", type=Path, default=SHIPPED, help="where the packaged ControlNet goes")
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--steps", type=int, help="train by steps instead of minutes: exactly repeatable")
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = vars(parser.parse_args())
    target = args.pop("target")
    print(f"{target}: {package(train(**args), target) / 1e6:.1f} MB", flush=True)


if __name__ == "__main__":
    main()
