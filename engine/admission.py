"""Whether a request fits the memory beside the weights."""

from __future__ import annotations

import math

import torch
from torch import nn

from ..kernels.sampler_step.columns import Column
from .batch import WINDOW
from .components import Components
from .memory import Budget, RowSize, activation_bytes
from .models.controlled import Controlled, columns
from .models.unet import UNet
from .models.vae_tiling import TILE, in_tiles
from .prompting import token_counts
from .runtimes.exported import VAE, Denoiser
from .runtimes.networks import DenoiserNetwork
from .settling import Settled


class Admission:
    """Of one model. Safe to use from several threads.

    beside: the admission of another model on the same device; they share what is free.
    """

    def __init__(self, parts: Components, beside: Admission | None = None) -> None:
        self._parts = parts
        own = parts.config.memory_bytes
        free = math.inf if own else _free(parts.config.device) if beside is None else beside.free
        self.free, self._own = free, own or math.inf
        self._columns = _columns(parts.denoiser)

    def lower(self, count: int) -> None:
        """Weights of another model have taken that many bytes."""
        self.free -= count

    def fits(self, settled: Settled) -> None:
        """Raise MemoryBudgetError for a request of which not even one row fits, RequestError for what the graphs of an
        artefact do not run.
        """
        _require_graphs(self._parts, settled)
        limit = min(self._own, self.free)
        if limit < math.inf:
            budget = Budget(max(int(limit), 0), headroom=0.0)
            budget.require(self.row(settled), settled.branches, settled.width, settled.height)

    def row(self, settled: Settled) -> RowSize:
        """The numbers that fix the bytes of a row of the request."""
        parts, net = self._parts, self._parts.denoiser.config
        height, width = settled.height // parts.scale, settled.width // parts.scale
        element, updates = torch.finfo(parts.config.dtype).bits // 8, len(settled.plan.updates)
        controls = len(settled.controls)
        time, prompt = self._columns if not controls else _columns(parts.network(settled.control_names))
        widths, layers = [level.channels for level in net.down], max(level.layers for level in net.down)
        return RowSize(
            channels=parts.channels,
            height=height,
            width=width,
            updates=WINDOW + (updates if updates > WINDOW else 0),
            columns=len(Column),
            tokens=max(token_counts(parts, settled), default=0),
            prompt_columns=prompt,
            time_columns=time,
            image_columns=controls * widths[0],
            activations=activation_bytes(widths, layers, height, width, element, controls),
            element=element,
            state=8 if parts.config.dtype == torch.float64 else 4,
        )


def _require_graphs(parts: Components, settled: Settled) -> None:
    """Raise RequestError where a graph would fail when its turn comes: sizes, prompts, a missing encoder."""
    net, vae, scale = parts.denoiser, parts.vae, parts.scale
    height, width = settled.height // scale, settled.width // scale
    if isinstance(net, Denoiser):
        net.require_size(height, width, scale)
        net.require_tokens(token_counts(parts, settled))
    if isinstance(vae, VAE):
        tile = TILE if in_tiles(parts.config.vae_tiling, settled.height, settled.width) else None
        if settled.pictures.images:
            vae.require("vae_encoder", height, width, tile)
        if settled.request.output != "latent":
            vae.require("vae_decoder", height, width, tile)


def _columns(net: DenoiserNetwork | Controlled) -> tuple[int, int]:
    """Widths of what a network prepares: of an update's time, then of a token of the prompt."""
    if isinstance(net, UNet):
        return columns(net)
    if isinstance(net, Controlled):
        return net.columns
    width = net.config.text_dim or net.config.blocks.cross_dim or 0
    return 1, width  # an exported network keeps the timestep and the prompt as they are


def _free(device: torch.device) -> int:
    """Bytes that could be allocated on a CUDA device now."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def weight_bytes(parts: Components) -> int:
    """Memory of all networks of a checkpoint; of an artefact's graphs the bytes of their files."""
    networks = [parts.denoiser, parts.vae, *parts.controlnets.values(), *(encoder.model for encoder in parts.text)]
    tensors = [t for net in networks if isinstance(net, nn.Module) for t in (*net.parameters(), *net.buffers())]
    return parts.artifact_bytes + sum(tensor.numel() * tensor.element_size() for tensor in tensors)
