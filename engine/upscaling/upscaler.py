"""What enlarges images, and how large ones pass through it in tiles."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..errors import RequestError
from ..models.tiles import Tiles

Progress = Callable[[int, int], None]
"""(tiles done, all tiles)."""

TOGETHER = 512 * 512
"""Input pixels of tiles that run at once: one tile of the default size, or several smaller ones."""


class Upscaler(Protocol):
    """Anything that enlarges images by one factor."""

    @property
    def scale(self) -> float:
        """Sides of the result over sides of the images."""
        ...

    def __call__(self, images: Tensor) -> Tensor:
        """float32 [n, 3, round(scale * H), round(scale * W)] in 0..1 from float images [n, 3, H, W] in 0..1."""
        ...


@dataclass(frozen=True)
class Tiled:
    """An upscaler of a whole factor that sees one image at a time, in overlapping tiles with blended seams (`tiled`).

    Raises RequestError for tiles that cannot overlap so, or a factor that is no whole number.
    """

    upscaler: Upscaler
    tile: int = 512
    overlap: int = 32
    together: int = TOGETHER
    progress: Progress | None = None

    def __post_init__(self) -> None:
        if not 0 < self.overlap <= self.tile // 2:
            raise RequestError(f"overlap: got {self.overlap} with tiles of {self.tile}, expected 1 to half a tile")
        if self.scale != int(self.scale):
            raise RequestError(f"scale: got {self.scale}; images in tiles are enlarged by whole numbers only")

    @property
    def scale(self) -> float:
        """As of the upscaler."""
        return self.upscaler.scale

    def __call__(self, images: Tensor) -> Tensor:
        """As of `Upscaler`."""
        return tiled(self.upscaler, images, self.tile, self.overlap, together=self.together, progress=self.progress)


def tiled(
    upscale: Callable[[Tensor], Tensor],
    images: Tensor,
    tile: int = 512,
    overlap: int = 32,
    *,
    feather: int | None = None,
    together: int = TOGETHER,
    progress: Progress | None = None,
) -> Tensor:
    """upscale(images [n, 3, H, W]) from overlapping tiles of `tile` x `tile` pixels, one image after the other.

    feather: pixels in the middle of the overlap over which neighbours are blended; None: a quarter of the overlap. The
    rest of the overlap is dropped: a tile is wrong near its border, where it lacks what lies beyond. So the result
    equals the untiled one, but for rounding, if no pixel depends on pixels farther away than (overlap - feather) // 2.
    together: tiles run at once while they have so many pixels; at least one does. Raises ValueError unless
    0 < feather <= overlap <= tile / 2.
    """
    height, width = images.shape[-2:]
    tiles = Tiles(height, width, tile, overlap, max(1, overlap // 4) if feather is None else feather)
    batch = max(1, together // math.prod(tiles.shape))
    done, total = 0, len(images) * len(tiles)

    def parts(image: Tensor) -> Iterator[Tensor]:
        nonlocal done
        crops = tiles.crops(image)
        for first in range(0, len(crops), batch):
            made = upscale(torch.cat(crops[first : first + batch]))
            done += len(made)
            if progress is not None:
                progress(done, total)
            yield from made.split(1)

    return torch.cat([tiles.blend(parts(image)) for image in images.split(1)])
