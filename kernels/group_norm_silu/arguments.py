"""What both ways to launch `group_norm_silu` read: the image, and the vectors per channel."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..op import is_channels_last


@dataclass(frozen=True)
class Image:
    """x and x2 in one layout, that of x."""

    x: torch.Tensor
    x2: torch.Tensor | None
    channels_last: bool

    @staticmethod
    def of(x: torch.Tensor, x2: torch.Tensor | None) -> Image:
        """A tensor that is neither channels-last nor contiguous is copied, and so is an x2 unlike x."""
        channels_last = is_channels_last(x)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        return Image(
            x.contiguous(memory_format=layout),
            None if x2 is None else x2.contiguous(memory_format=layout),
            channels_last,
        )

    @property
    def rows(self) -> int:
        """B."""
        return self.x.shape[0]

    @property
    def sites(self) -> int:
        """H * W, or L."""
        return self.x.shape[2:].numel()

    @property
    def channels1(self) -> int:
        """Channels of x."""
        return self.x.shape[1]

    @property
    def channels2(self) -> int:
        """Channels of x2."""
        return 0 if self.x2 is None else self.x2.shape[1]

    @property
    def channels(self) -> int:
        """Channels of both."""
        return self.channels1 + self.channels2

    def empty(self) -> torch.Tensor:
        """An output [B, channels, ...] in the layout of x."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        shape = (self.rows, self.channels, *self.x.shape[2:])
        return torch.empty(shape, dtype=self.x.dtype, device=self.x.device, memory_format=layout)


@dataclass(frozen=True)
class Vectors:
    """weight, bias [C]; pre_bias, scale, shift [B or 1, C] or None, with the stride of their rows (0: one for all)."""

    tensors: tuple[torch.Tensor | None, ...]
    strides: tuple[int, int, int]

    @staticmethod
    def of(weight: torch.Tensor, bias: torch.Tensor, *by_row: torch.Tensor | None) -> Vectors:
        """`by_row` may be slices of something wider, as the projections of a time embedding are: only rows stride."""
        rows = [t if t is None or t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous() for t in by_row]
        strides = [0 if t is None or t.shape[0] == 1 else t.stride(0) for t in rows]
        return Vectors((weight.contiguous(), bias.contiguous(), *rows), (strides[0], strides[1], strides[2]))
