"""What a network must offer to take the place of one of ours in the engine, whatever executes it."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from ..models.unet import Conditioning
from ..models.unet_config import UNetConfig
from ..models.vae import Gaussian, VAEConfig


class DenoiserNetwork(Protocol):
    """`UNet`: `prepare` once per request, a call per update."""

    config: UNetConfig

    @property
    def dtype(self) -> torch.dtype:
        """dtype latents are taken in."""
        ...

    def prepare(self, conditioning: Conditioning, timesteps: Tensor) -> Any:
        """A dataclass of tensors that lead with the rows, one of them `time` [R, U, *]; timesteps: float [R, U]."""
        ...

    def __call__(self, latents: Tensor, prepared: Any, update: Tensor) -> Tensor:
        """The network's output [R, C, h, w] for latents [R, C_in, h, w] at each row's own update (int64 [R])."""
        ...


class Autoencoder(Protocol):
    """`AutoencoderKL`: latents in the autoencoder's own scale."""

    config: VAEConfig

    def encode(self, images: Tensor) -> Gaussian:
        """images: [R, 3, H, W] in -1..1."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """latents: [R, C, h, w] to images [R, 3, H, W], about -1..1."""
        ...
