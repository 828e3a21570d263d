"""LoRA (Hu et al. 2021) as data of the rows: side paths beside layers, y = base(x) + up(strength * down(x)).

The factors of all LoRAs of a layer lie in one bank, zero-padded to one rank, and every row takes its own from it by
index: rows share a forward whatever LoRAs they have, as long as they have equally many, and another LoRA or strength
changes no shape, no captured graph and no compiled network.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from .controlled import Controlled
    from .unet import UNet


class Chosen:
    """The LoRAs of the rows that networks are called with, for their side paths to read; outside of `of` none.

    entries: int64 [R, S, kinds], where the row's S LoRAs lie in the banks of every kind; strengths: [R, S], in the
    dtype of the layers. R may be 1, for all rows. Of one thread: whoever runs the networks.
    """

    def __init__(self) -> None:
        self.entries: Tensor | None = None
        self.strengths: Tensor | None = None

    @contextmanager
    def of(self, entries: Tensor, strengths: Tensor) -> Iterator[None]:
        """These, for the time of a call."""
        self.entries, self.strengths = entries, strengths
        try:
            yield
        finally:
            self.entries = self.strengths = None


class SidePath(nn.Module):
    """The factors of every LoRA of one layer.

    bank: [n, r, i + o], entry, rank, and side by side the rows of down [r, i] and of up [o, r] transposed. kind: the
    column of `Chosen.entries` that this bank is read by.
    """

    def __init__(self, bank: Tensor, width: int, kind: int, chosen: Chosen) -> None:
        """width: i, inputs of the layer; of a convolution those of a patch, i * k * k."""
        super().__init__()
        self.widths, self.kind, self.chosen = (width, bank.shape[2] - width), kind, chosen
        self.register_buffer("bank", bank, persistent=False)

    @property
    def bytes(self) -> int:
        """Memory of the bank."""
        return self.get_buffer("bank").nbytes

    @property
    def active(self) -> bool:
        """Whether the rows of this call have LoRAs."""
        return self.chosen.entries is not None

    def factors(self, rows: int) -> tuple[Tensor, Tensor]:
        """strength * down [rows, S * r, i] and up [rows, S * r, o] of every row."""
        entries, strengths = self.chosen.entries, self.chosen.strengths
        assert entries is not None
        assert strengths is not None
        down, up = self.get_buffer("bank")[entries[..., self.kind]].split(self.widths, -1)
        down = down * strengths[..., None, None]
        return down.flatten(1, 2).expand(rows, -1, -1), up.flatten(1, 2).expand(rows, -1, -1)


class AdaptedLinear(nn.Linear):
    """A linear layer, of whose parameters it takes no copy, with a side path."""

    def __init__(self, base: nn.Linear, side: SidePath) -> None:
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight, self.bias, self.side = base.weight, base.bias, side

    def forward(self, input: Tensor) -> Tensor:
        """input: [R, ..., i]."""
        return self.add(super().forward(input), input)

    def add(self, y: Tensor, x: Tensor) -> Tensor:
        """y [R, ..., o] and what the side path makes of x [R, ..., i]."""
        if not self.side.active:
            return y
        rows = len(x)
        down, up = self.side.factors(rows)
        inner = x.reshape(rows, -1, x.shape[-1]) @ down.mT
        return torch.baddbmm(y.reshape(rows, -1, y.shape[-1]), inner, up).view(y.shape)


class AdaptedConv2d(nn.Conv2d):
    """A convolution, of whose parameters it takes no copy, with a side path."""

    def __init__(self, base: nn.Conv2d, side: SidePath) -> None:
        size: Any = (base.kernel_size, base.stride, base.padding)
        super().__init__(base.in_channels, base.out_channels, *size, bias=base.bias is not None, device="meta")
        self.weight, self.bias, self.side = base.weight, base.bias, side

    def forward(self, input: Tensor) -> Tensor:
        """input: [R, C, h, w]."""
        return self.add(super().forward(input), input)

    def add(self, y: Tensor, x: Tensor) -> Tensor:
        """y [R, o, h', w'] and what the side path makes of x [R, C, h, w]: a group of the convolution for every row."""
        if not self.side.active:
            return y
        rows = len(x)
        down, up = self.side.factors(rows)
        kernels = down.reshape(-1, *self.weight.shape[1:])
        inner = F.conv2d(x.reshape(1, -1, *x.shape[2:]), kernels, None, self.stride, self.padding, groups=rows)
        inner = inner.reshape(rows, down.shape[1], -1).mT  # [R, h' * w', S * r]
        tokens = torch.baddbmm(y.permute(0, 2, 3, 1).flatten(1, 2), inner, up)
        return tokens.unflatten(1, y.shape[2:]).permute(0, 3, 1, 2)


def add_sides(y: Tensor, x: Tensor, layers: Sequence[nn.Linear]) -> Tensor:
    """y [R, L, sum of o], the outputs of layers side by side, and what their side paths make of their x [R, L, i]."""
    if not any(isinstance(layer, AdaptedLinear) and layer.side.active for layer in layers):
        return y
    parts = zip(layers, y.split([layer.out_features for layer in layers], -1), strict=True)
    return torch.cat([layer.add(part, x) if isinstance(layer, AdaptedLinear) else part for layer, part in parts], -1)


def adapt(network: nn.Module, name: str, side: SidePath) -> None:
    """Give a linear layer or convolution of a network a side path, in place."""
    stem, _, leaf = name.rpartition(".")
    base = network.get_submodule(name)
    assert isinstance(base, nn.Linear | nn.Conv2d)
    adapted = AdaptedLinear(base, side) if isinstance(base, nn.Linear) else AdaptedConv2d(base, side)
    setattr(network.get_submodule(stem), leaf, adapted)


class Adapted(nn.Module):
    """A network with side paths, called as itself, for rows that were prepared with LoRAs."""

    def __init__(self, network: UNet | Controlled, chosen: Chosen) -> None:
        super().__init__()
        self.config, self.network, self.chosen = network.config, network, chosen

    def forward(self, latents: Tensor, prepared: Any, update: Tensor) -> Tensor:
        """As the network; prepared has the rows' `loras` and `strengths`, as of Chosen."""
        with self.chosen.of(prepared.loras, prepared.strengths):
            return self.network(latents, prepared, update)
