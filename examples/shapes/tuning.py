"""Training a few parameters beside the frozen model `shapes`: what its LoRAs and its learned words have in common."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from transformers import CLIPTextModel

from .denoiser import EMA_DECAY, NEAR, SAVE_SECONDS, SCHEDULER, object_weight
from .package import SHIPPED as SHAPES
from .progress import Progress, load_checkpoint, run, save_checkpoint

Sample = Callable[[random.Random], tuple[Tensor, Tensor]]
"""One batch: exact latents [B, 8, 8, 8] and token ids [B, L] of captions."""


class Tuner:
    """The parameters `open_up` finds or makes in the frozen networks, their average and the optimizer."""

    def __init__(
        self, open_up: Callable[[nn.Module, nn.Module], Mapping[str, nn.Parameter]], lr: float, device: str
    ) -> None:
        self.unet = UNet2DConditionModel.from_pretrained(SHAPES / "unet", torch_dtype=torch.float32)
        self.text = CLIPTextModel.from_pretrained(SHAPES / "text_encoder", torch_dtype=torch.float32)
        for part in (self.unet, self.text):
            part.requires_grad_(False).eval()
        self.trained = dict(open_up(self.unet, self.text))
        for part in (self.unet, self.text):
            part.to(device)
        self.unet.set_attn_processor(AttnProcessor())  # plain matrix products: faster on the CPU, see denoiser.py
        self.parameters = list(self.trained.values())
        self.average = [p.detach().clone() for p in self.parameters]
        self.lr, self.device = lr, device
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
        self.alphas = DDIMScheduler(**SCHEDULER).alphas_cumprod.to(device)

    def loss(self, latents: Tensor, ids: Tensor, weight: float) -> Tensor:
        """Weighted mean squared error of v = sqrt(a) noise - sqrt(1 - a) latents; draws timesteps and noise."""
        batch = len(latents)
        latents = latents.to(self.device)
        timesteps = (1000 * (torch.arange(batch) + torch.rand(batch)) / batch).long().clamp(max=999).to(self.device)
        noise = torch.randn(latents.shape).to(self.device)
        signal = self.alphas[timesteps].sqrt()[:, None, None, None]
        spread = (1 - self.alphas[timesteps]).sqrt()[:, None, None, None]
        with torch.autocast(torch.device(self.device).type, torch.bfloat16):
            states = self.text(ids.to(self.device))[0]
            output = self.unet(signal * latents + spread * noise, timesteps, states).sample
        error = (output.float() - (signal * noise - spread * latents)) ** 2
        weights = 1 + weight * (latents[:, 3:].amax(1, keepdim=True) > NEAR)
        return (weights * error).mean() / weights.mean()

    def step(self, loss: Tensor, progress: Progress) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = progress.cosine(self.lr, warmup=20)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        decay = min(EMA_DECAY, (1 + progress.step) / (10 + progress.step))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)

    def state(self) -> dict:
        return {
            "trained": {name: parameter.detach() for name, parameter in self.trained.items()},
            "average": dict(zip(self.trained, self.average, strict=True)),
            "optimizer": self.optimizer.state_dict(),
        }

    def restore(self, state: dict) -> None:
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(state["trained"][name])
        self.average = [state["average"][name].to(self.device) for name in self.trained]
        self.optimizer.load_state_dict(state["optimizer"])


def tune(tuner: Tuner, sample: Sample, checkpoint: Path, progress: Progress, seed: int = 0) -> dict[str, Tensor]:
    """Train until the budget is used, going on from the checkpoint where there is one; returns the average."""
    if state := load_checkpoint(checkpoint):
        tuner.restore(state["tuner"])
        progress.restore(state["progress"])

    def step() -> Tensor:
        torch.manual_seed(seed * 1_000_003 + progress.step)
        latents, ids = sample(random.Random(f"{progress.name} {seed} {progress.step}"))
        loss = tuner.loss(latents, ids, object_weight(progress.fraction))
        tuner.step(loss, progress)
        return loss

    def save() -> None:
        save_checkpoint(checkpoint, {"tuner": tuner.state(), "progress": progress.state()})

    run(progress, step, save, SAVE_SECONDS)
    return {name: tensor.cpu() for name, tensor in zip(tuner.trained, tuner.average, strict=True)}
