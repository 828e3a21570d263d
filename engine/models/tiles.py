"""Overlapping tiles of one shape, and their way back to one image without seams."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class Tiles:
    """The tiles of images [R, C, height, width], in rows from the top left.

    All tiles have one shape (the last one of a line is moved inwards instead of cut), so that they share batches and
    compiled networks. overlap: the least that neighbours share. feather: over how much of its middle they are blended;
    None: over all of it. Raises ValueError unless 0 < feather <= overlap <= tile / 2.
    """

    def __init__(self, height: int, width: int, tile: int, overlap: int, feather: int | None = None) -> None:
        if not 0 < overlap <= tile // 2:
            raise ValueError(f"overlap {overlap} with tiles of {tile}: expected 1 to {tile // 2}")
        if feather is not None and not 0 < feather <= overlap:
            raise ValueError(f"feather {feather} with an overlap of {overlap}: expected 1 to {overlap}")
        self.size, self.overlap = (height, width), overlap
        self.feather = overlap if feather is None else feather
        self.shape = min(tile, height), min(tile, width)
        self.tops, self.lefts = _starts(height, tile, overlap), _starts(width, tile, overlap)

    def __len__(self) -> int:
        return len(self.tops) * len(self.lefts)

    @property
    def places(self) -> list[tuple[int, int]]:
        """(top, left) of every tile."""
        return [(top, left) for top in self.tops for left in self.lefts]

    def crops(self, images: Tensor, factor: int = 1) -> list[Tensor]:
        """Every tile of images [R, C, factor * height, factor * width], as views [R, C, *]."""
        high, wide = (factor * side for side in self.shape)
        return [
            images[..., factor * top : factor * top + high, factor * left : factor * left + wide]
            for top, left in self.places
        ]

    def blend(self, parts: Iterable[Tensor]) -> Tensor:
        """The images [R, C, f * height, f * width] of which tile after tile is [R, C, f * tile, f * tile].

        Every pixel is the mean of the tiles that cover it, weighted by a ramp that falls to nothing over the feather
        where another tile continues: the result is continuous across seams.
        """
        image, total = torch.empty(0), torch.empty(0)
        for (top, left), part in zip(self.places, parts, strict=True):
            factor = part.shape[-1] // self.shape[1]
            if not image.numel():
                height, width = (factor * side for side in self.size)
                image, total = part.new_zeros(*part.shape[:2], height, width), part.new_zeros(height, width)
            edge, extent = (self.overlap - self.feather) * factor / 2, self.feather * factor
            weight = _ramp(top, self.tops, edge, extent, part.shape[-2], part)[:, None]
            weight = weight * _ramp(left, self.lefts, edge, extent, part.shape[-1], part)
            rows, columns = (
                slice(at * factor, at * factor + n) for at, n in zip((top, left), weight.shape, strict=True)
            )
            image[..., rows, columns] += part * weight
            total[rows, columns] += weight
        return image / total


def _starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin along one side: neighbours share at least `overlap`, the last one ends with the side."""
    if length <= tile:
        return [0]
    return [*range(0, length - tile, tile - overlap), length - tile]


def _ramp(start: int, starts: list[int], edge: float, extent: int, pixels: int, like: Tensor) -> Tensor:
    """Weights of one tile's pixels along one side: none up to the edge, then a rise; all together are never zero."""
    rise = ((torch.arange(pixels, dtype=like.dtype, device=like.device) + 0.5 - edge) / extent).clamp(min=0)
    weight = torch.ones_like(rise)
    if start != starts[0]:
        weight = weight * rise.clamp(max=1)
    if start != starts[-1]:
        weight = weight * rise.flip(0).clamp(max=1)
    return weight
