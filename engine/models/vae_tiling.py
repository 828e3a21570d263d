"""Decode large latents in bounded memory: one row at a time, or tile by tile with blended seams."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Decode = Callable[[Tensor], Tensor]


def sliced(decode: Decode, latents: Tensor) -> Tensor:
    """decode(latents [R, C, h, w]), one row at a time: the peak memory of a single image."""
    return torch.cat([decode(row) for row in latents.split(1)])


def tiled(decode: Decode, latents: Tensor, tile: int = 64, overlap: int = 16) -> Tensor:
    """decode(latents [R, C, h, w]) from overlapping tiles of `tile` x `tile` latents.

    All tiles have one shape (the last one of a line is moved inwards instead of cut), so one compiled decoder serves
    them all. Every pixel is the mean of the tiles that cover it, weighted by a ramp that falls to nothing over
    `overlap` latents where another tile continues: the result is continuous across seams. It differs from the untiled
    image because group norms and attention see one tile only. Raises ValueError unless 0 < overlap <= tile / 2.
    """
    if not 0 < overlap <= tile // 2:
        raise ValueError(f"overlap {overlap} with tiles of {tile}: expected 1 to {tile // 2}")
    height, width = latents.shape[-2:]
    if height <= tile and width <= tile:
        return decode(latents)
    tops, lefts = _starts(height, tile, overlap), _starts(width, tile, overlap)
    image, total = None, None
    for top in tops:
        for left in lefts:
            part = decode(latents[..., top : top + tile, left : left + tile])
            factor = part.shape[-1] // min(tile, width)
            if image is None or total is None:
                image = part.new_zeros(*part.shape[:2], height * factor, width * factor)
                total = part.new_zeros(height * factor, width * factor)
            down = _ramp(top, tops, height, tile, overlap * factor, factor, part)
            right = _ramp(left, lefts, width, tile, overlap * factor, factor, part)
            weight = down[:, None] * right
            box = (
                ...,
                slice(top * factor, top * factor + len(down)),
                slice(left * factor, left * factor + len(right)),
            )
            image[box] += part * weight
            total[box] += weight
    assert image is not None
    assert total is not None
    return image / total


def _starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin along one side: neighbours share at least `overlap`, the last one ends with the side."""
    if length <= tile:
        return [0]
    return [*range(0, length - tile, tile - overlap), length - tile]


def _ramp(start: int, starts: list[int], length: int, tile: int, extent: int, factor: int, like: Tensor) -> Tensor:
    """Weights of one tile's pixels along one side; never zero, so that the sum of all tiles never is."""
    pixels = min(tile, length) * factor
    rise = (torch.arange(pixels, dtype=like.dtype, device=like.device) + 0.5) / extent
    weight = torch.ones_like(rise)
    if start != starts[0]:
        weight = weight * rise.clamp(max=1)
    if start != starts[-1]:
        weight = weight * rise.flip(0).clamp(max=1)
    return weight
