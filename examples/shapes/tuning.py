"""Training beside the frozen model `shapes`: what its LoRAs, words, ControlNet and inpainting have in common."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from transformers import CLIPTextModel

from .averaging import Averaged, run
from .diffusion import object_weight, velocity_loss
from .package import SHIPPED as SHAPES
from .progress import Progress

Sample = Callable[[random.Random], tuple[Tensor, Tensor]]
"""One batch: exact latents [B, 8, 8, 8] and token ids [B, L] of captions."""


class Tuner:
    """The parameters `open_up` finds or makes in the frozen networks, and their optimizer."""

    def __init__(
        self,
        open_up: Callable[[nn.Module, nn.Module], Mapping[str, nn.Parameter]],
        lr: float,
        device: str,
        *,
        warmup: int = 20,
        weight_decay: float = 0.0,
        fused: bool | None = None,
    ) -> None:
        self.unet = UNet2DConditionModel.from_pretrained(SHAPES / "unet", torch_dtype=torch.float32)
        self.text = CLIPTextModel.from_pretrained(SHAPES / "text_encoder", torch_dtype=torch.float32)
        for part in (self.unet, self.text):
            part.requires_grad_(False).eval()
        trained = open_up(self.unet, self.text)
        for part in (self.unet, self.text):
            part.to(device)
        self.unet.set_attn_processor(AttnProcessor())  # plain matrix products: faster on the CPU, see denoiser.py
        self.device = device
        self.optimizer = Averaged(
            torch.optim.AdamW(trained.items(), lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=fused),
            warmup=warmup,
        )

    def loss(self, latents: Tensor, ids: Tensor, weight: float) -> Tensor:
        """See `velocity_loss`; draws timesteps and noise."""

        def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
            return self.unet(noisy, timesteps, self.text(ids.to(self.device))[0]).sample

        return velocity_loss(predict, latents.to(self.device), weight)


def tune(tuner: Tuner, sample: Sample, checkpoint: Path, progress: Progress, seed: int = 0) -> dict[str, Tensor]:
    """Train until the budget is used, going on from the checkpoint where there is one; returns the average."""

    def loss(rng: random.Random) -> Tensor:
        return tuner.loss(*sample(rng), object_weight(progress.fraction))

    run(tuner.optimizer, progress, checkpoint, loss, seed=seed)
    return {name: tensor.cpu() for name, tensor in tuner.optimizer.average.items()}
