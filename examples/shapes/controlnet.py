"""Trains and packages `shapes-silhouette`, the ControlNet of `shapes`: objects appear where a silhouette has them.

    python -m stepfuse.examples.shapes.controlnet --minutes 15

Zhang et al. 2023: a trainable copy of the U-Net's way down behind a small entry of the picture, whose outputs begin as
zeros; U-Net and text encoder are frozen. Data, timesteps and loss as in `denoiser.py`, but the objects stand anywhere.
"""

from __future__ import annotations

import argparse
import random
import shutil
from pathlib import Path

import numpy as np
import torch
from diffusers import ControlNetModel, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor
from transformers import CLIPTextModel

from .denoiser import DROP, EMA_DECAY, NEAR, SAVE_SECONDS, SCHEDULER, object_weight
from .latents import encode_scenes
from .package import SHIPPED as SHAPES
from .package import ship
from .progress import Progress, load_checkpoint, run, save_checkpoint
from .scenes import Combination, caption, load_heldout
from .silhouettes import sample_free_scene, silhouette
from .text_encoder import Words
from .tokenizer import build_tokenizer

SHIPPED = SHAPES.with_name("shapes-silhouette")
WIDTHS = (16, 32, 48, 64)  # of the entry: 64x64 pixels to 8x8 latents in three halvings
FILE_LIMIT = 6 * 10**6


def build_controlnet(unet: UNet2DConditionModel) -> ControlNetModel:
    """A ControlNet with the weights of the U-Net's way down; it changes nothing before it is trained."""
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=WIDTHS)
    # Zeros at the outputs suffice for that; a second layer of zeros in front would only delay the first gradients.
    torch.nn.init.normal_(net.controlnet_cond_embedding.conv_out.weight, std=0.02)
    return net


def sample_batch(
    rng: random.Random, batch: int, heldout: frozenset[Combination]
) -> tuple[Tensor, Tensor, Tensor, list[str]]:
    """Fresh scenes: latents [B, 8, 8, 8], where objects are [B, 1, 8, 8], silhouettes [B, 3, 64, 64], captions."""
    scenes = [sample_free_scene(rng, heldout) for _ in range(batch)]
    latents = torch.from_numpy(encode_scenes(scenes))
    objects = (latents[:, 3:].amax(1, keepdim=True) > NEAR).float()
    pictures = torch.from_numpy(np.stack([silhouette(scene) for scene in scenes])).permute(0, 3, 1, 2)
    captions = ["" if rng.random() < DROP else caption(scene, rng) for scene in scenes]
    return latents, objects, pictures.contiguous(), captions


class Trainer:
    """The ControlNet, its average and the optimizer, beside the frozen model in `source`."""

    def __init__(self, source: Path, lr: float, device: str) -> None:
        unet = UNet2DConditionModel.from_pretrained(source / "unet", torch_dtype=torch.float32)
        text = CLIPTextModel.from_pretrained(source / "text_encoder", torch_dtype=torch.float32)
        self.net = build_controlnet(unet).to(device).train()
        self.unet, self.text = unet.to(device).requires_grad_(False), text.to(device).requires_grad_(False)
        for part in (self.net, self.unet):
            part.set_attn_processor(AttnProcessor())  # plain matrix products: faster on the CPU, see denoiser.py
        self.parameters = list(self.net.parameters())
        self.average = [p.detach().clone() for p in self.parameters]
        self.lr, self.device = lr, device
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        self.alphas = DDIMScheduler(**SCHEDULER).alphas_cumprod.to(device)

    def loss(self, latents: Tensor, objects: Tensor, pictures: Tensor, words: Tensor, weight: float) -> Tensor:
        """Weighted mean squared error of v = sqrt(a) noise - sqrt(1 - a) latents; draws timesteps and noise."""
        batch = len(latents)
        latents, objects, pictures = (t.to(self.device) for t in (latents, objects, pictures))
        timesteps = (1000 * (torch.arange(batch) + torch.rand(batch)) / batch).long().clamp(max=999).to(self.device)
        noise = torch.randn(latents.shape).to(self.device)
        signal = self.alphas[timesteps].sqrt()[:, None, None, None]
        spread = (1 - self.alphas[timesteps]).sqrt()[:, None, None, None]
        noisy = signal * latents + spread * noise
        with torch.autocast(torch.device(self.device).type, torch.bfloat16):
            states = self.text(words.to(self.device))[0]
            down, mid = self.net(noisy, timesteps, states, controlnet_cond=pictures, return_dict=False)
            output = self.unet(
                noisy,
                timesteps,
                states,
                down_block_additional_residuals=down,
                mid_block_additional_residual=mid,
            ).sample
        error = (output.float() - (signal * noise - spread * latents)) ** 2
        weights = 1 + weight * objects
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
        return {"net": self.net.state_dict(), "average": self.average, "optimizer": self.optimizer.state_dict()}

    def restore(self, state: dict) -> None:
        self.net.load_state_dict(state["net"])
        self.average = [tensor.to(self.device) for tensor in state["average"]]
        self.optimizer.load_state_dict(state["optimizer"])


def train(work: Path, *, minutes: float, steps: int | None, batch: int, lr: float, device: str, seed: int = 0) -> Path:
    """Train (or go on training); returns the checkpoint, which `package` reads."""
    heldout = load_heldout()
    torch.manual_seed(seed)
    words = Words(build_tokenizer(work / "tokenizer"))
    trainer = Trainer(SHAPES, lr, device)
    progress = Progress("controlnet", minutes=minutes, steps=steps)
    path = work / "controlnet.pt"
    if state := load_checkpoint(path):
        trainer.restore(state["trainer"])
        progress.restore(state["progress"])

    def step() -> Tensor:
        rng = random.Random(f"controlnet {seed} {progress.step}")
        torch.manual_seed(seed * 1_000_003 + progress.step)
        latents, objects, pictures, captions = sample_batch(rng, batch, heldout)
        loss = trainer.loss(latents, objects, pictures, words(captions), object_weight(progress.fraction))
        trainer.step(loss, progress)
        return loss

    def save() -> None:
        save_checkpoint(path, {"trainer": trainer.state(), "progress": progress.state()})

    run(progress, step, save, SAVE_SECONDS)
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
        for parameter, mean in zip(net.parameters(), state["trainer"]["average"], strict=True):
            parameter.copy_(mean)
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
