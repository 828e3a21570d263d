"""Trains the inpainting model of `shapes`: a U-Net that sees the mask and what it leaves of the picture.

    python -m stepfuse.examples.shapes.inpainting --minutes 30

The U-Net and its text encoder are frozen; its new entry and a LoRA are trained (`inpainting_weights.py`). Timesteps and
loss as in `denoiser.py`; the picture beside the latents goes through the encoder, as it will when an engine edits.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor
from transformers import CLIPTextModel

from .denoiser import DROP, EMA_DECAY, NEAR, SAVE_SECONDS, SCHEDULER, object_weight
from .inpainting_masks import sample_mask
from .inpainting_weights import DIFFERENCE, open_unet, save_difference
from .latents import CELL, encode_scenes
from .package import SHIPPED as SHAPES
from .progress import Progress, load_checkpoint, run, save_checkpoint
from .render import render
from .scenes import Combination, caption, load_heldout, sample_pair, sample_single
from .text_encoder import Words
from .tokenizer import build_tokenizer

PAIRS = 0.65  # of the scenes


def sample_batch(
    rng: random.Random, batch: int, heldout: frozenset[Combination]
) -> tuple[Tensor, Tensor, Tensor, list[str]]:
    """Fresh scenes: latents [B, 8, 8, 8], pictures [B, 3, 64, 64] in 0..1, masks [B, 1, 64, 64], captions."""
    scenes = [sample_pair(rng, heldout) if rng.random() < PAIRS else sample_single(rng) for _ in range(batch)]
    masks = np.stack([sample_mask(rng, scene) for scene in scenes])[:, None]
    captions = ["" if rng.random() < DROP else caption(scene, rng) for scene in scenes]
    return torch.from_numpy(encode_scenes(scenes)), torch.from_numpy(render(scenes)), torch.from_numpy(masks), captions


class Trainer:
    """What is trained, its average and the optimizer, beside the frozen model in `source`."""

    def __init__(self, source: Path, lr: float, device: str) -> None:
        self.unet = UNet2DConditionModel.from_pretrained(source / "unet", torch_dtype=torch.float32)
        self.text = CLIPTextModel.from_pretrained(source / "text_encoder", torch_dtype=torch.float32)
        self.vae = AutoencoderKL.from_pretrained(source / "vae", torch_dtype=torch.float32)
        self.trained = open_unet(self.unet)
        for part in (self.unet, self.text.requires_grad_(False), self.vae.requires_grad_(False)):
            part.to(device)
        self.unet.set_attn_processor(AttnProcessor())  # plain matrix products: faster on the CPU, see denoiser.py
        self.parameters = list(self.trained.values())
        self.average = [p.detach().clone() for p in self.parameters]
        self.lr, self.device = lr, device
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        self.alphas = DDIMScheduler(**SCHEDULER).alphas_cumprod.to(device)

    @torch.no_grad()
    def beside(self, pictures: Tensor, masks: Tensor) -> Tensor:
        """What the U-Net sees beside the latents, [B, 9, 8, 8]: mask, and latents of the picture with gray under it.

        Of every site the mask's upper left pixel counts, as in diffusers.
        """
        left = self.vae.encode((2 * pictures - 1) * (1 - masks)).latent_dist.sample() * self.vae.config.scaling_factor
        return torch.cat([masks[:, :, ::CELL, ::CELL], left], 1)

    def loss(self, latents: Tensor, pictures: Tensor, masks: Tensor, words: Tensor, weight: float) -> Tensor:
        """Weighted mean squared error of v = sqrt(a) noise - sqrt(1 - a) latents; draws timesteps and noise."""
        batch = len(latents)
        latents, pictures, masks = (t.to(self.device) for t in (latents, pictures, masks))
        timesteps = (1000 * (torch.arange(batch) + torch.rand(batch)) / batch).long().clamp(max=999).to(self.device)
        noise = torch.randn(latents.shape).to(self.device)
        signal = self.alphas[timesteps].sqrt()[:, None, None, None]
        spread = (1 - self.alphas[timesteps]).sqrt()[:, None, None, None]
        noisy = signal * latents + spread * noise
        with torch.autocast(torch.device(self.device).type, torch.bfloat16):
            seen = torch.cat([noisy, self.beside(pictures, masks)], 1)
            output = self.unet(seen, timesteps, self.text(words.to(self.device))[0]).sample
        error = (output.float() - (signal * noise - spread * latents)) ** 2
        weights = 1 + weight * (latents[:, 3:].amax(1, keepdim=True) > NEAR)
        return (weights * error).mean() / weights.mean()

    def step(self, loss: Tensor, progress: Progress) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = progress.cosine(self.lr, warmup=50)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        decay = min(EMA_DECAY, (1 + progress.step) / (10 + progress.step))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)

    def state(self) -> dict:
        return {
            "trained": dict(zip(self.trained, (p.detach() for p in self.parameters), strict=True)),
            "average": dict(zip(self.trained, self.average, strict=True)),
            "optimizer": self.optimizer.state_dict(),
        }

    def restore(self, state: dict) -> None:
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(state["trained"][name])
        self.average = [state["average"][name].to(self.device) for name in self.trained]
        self.optimizer.load_state_dict(state["optimizer"])


def train(work: Path, *, minutes: float, steps: int | None, batch: int, lr: float, device: str, seed: int = 0) -> Path:
    """Train (or go on training); returns the checkpoint, which `package` reads."""
    heldout = load_heldout()
    torch.manual_seed(seed)
    words = Words(build_tokenizer(work / "tokenizer"))
    trainer = Trainer(SHAPES, lr, device)
    progress = Progress("inpainting", minutes=minutes, steps=steps)
    path = work / "inpainting.pt"
    if state := load_checkpoint(path):
        trainer.restore(state["trainer"])
        progress.restore(state["progress"])

    def step() -> Tensor:
        rng = random.Random(f"inpainting {seed} {progress.step}")
        torch.manual_seed(seed * 1_000_003 + progress.step)
        latents, pictures, masks, captions = sample_batch(rng, batch, heldout)
        loss = trainer.loss(latents, pictures, masks, words(captions), object_weight(progress.fraction))
        trainer.step(loss, progress)
        return loss

    def save() -> None:
        save_checkpoint(path, {"trainer": trainer.state(), "progress": progress.state()})

    run(progress, step, save, SAVE_SECONDS)
    return path


def package(checkpoint: Path, target: Path = DIFFERENCE) -> int:
    """Write the averaged difference in float16; returns its bytes. RuntimeError for a checkpoint that is not there."""
    state = load_checkpoint(checkpoint)
    if state is None:
        raise RuntimeError(f"{checkpoint}: no such checkpoint; train first")
    return save_difference(state["trainer"]["average"], target)


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
