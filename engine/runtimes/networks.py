"""What a network must offer to take the place of one of ours in the engine, and what executes exported graphs."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from ..artifact import Graph
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


class Binding(Protocol):
    """`Binder`: chooses the kernels of a network before it runs."""

    def bind(self, bucket: Hashable, run: Callable[[], Any]) -> None:
        """Make the choice for rows that share shapes; `run()` evaluates the network once."""
        ...

    def explain(self) -> str:
        """What was chosen and why."""
        ...


class Session(Protocol):
    """One graph of an artefact, ready to run. only_profiles: it runs the sizes of the graph's profiles, no others."""

    graph: Graph
    only_profiles: bool

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs by name, on the session's device; inputs by name. Raises RequestError for sizes it cannot run."""
        ...
