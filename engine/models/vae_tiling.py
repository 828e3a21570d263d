"""Decode large latents in bounded memory, tile by tile with blended seams."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .tiles import Tiles

Decode = Callable[[Tensor], Tensor]


def tiled(decode: Decode, latents: Tensor, tile: int = 64, overlap: int = 16) -> Tensor:
    """decode(latents [R, C, h, w]) from overlapping tiles of `tile` x `tile` latents, blended (`Tiles`).

    It differs from the untiled image because group norms and attention see one tile only. Raises ValueError unless
    0 < overlap <= tile / 2.
    """
    height, width = latents.shape[-2:]
    tiles = Tiles(height, width, tile, overlap)
    if len(tiles) == 1:
        return decode(latents)
    return tiles.blend(decode(part) for part in tiles.crops(latents))
