"""The upscalers of an engine by the name that requests call them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import RequestError, closest
from .lanczos import Lanczos, resample
from .network import load_upscaler
from .upscaler import Progress, Tiled, Upscaler

LANCZOS = "lanczos"
MOST_SCALE = 16
MOST_PIXELS = 16384 * 16384
"""Of a result: above, its three float32 channels alone are more than 3 GB."""


@dataclass(frozen=True)
class Resized:
    """An upscaler whose images are brought to another factor by Lanczos."""

    upscaler: Upscaler
    scale: float

    def __call__(self, images: Tensor) -> Tensor:
        """As of `Upscaler`."""
        height, width = (max(1, round(side * self.scale)) for side in images.shape[-2:])
        return resample(self.upscaler(images), height, width)


class Upscalers:
    """Safe to use from several threads. device: where networks go."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._known: dict[str, Upscaler] = {}

    def add(
        self,
        name: str,
        source: str | Path | Upscaler,
        *,
        dtype: torch.dtype | None = None,
        tile: int = 512,
        overlap: int = 32,
        progress: Progress | None = None,
    ) -> None:
        """Read a network (`load_upscaler`), which then runs in tiles (`tiled`), or take any upscaler as it is.

        Raises RequestError for a name that is taken or holds a colon, and what `load_upscaler` and `Tiled` raise.
        """
        if not isinstance(name, str) or not name or ":" in name:
            raise RequestError(f"name: got {name!r}, expected a name without a colon for requests to use")
        if name in self.names:
            raise RequestError(f"name: {name!r} is taken by another upscaler of this engine; choose another")
        if isinstance(source, (str, Path)):
            network = load_upscaler(source, self._device, dtype)
            source = network if network.wholes else Tiled(network, tile, overlap, progress=progress)
        self._known[name] = source

    @property
    def names(self) -> list[str]:
        """Of all."""
        return [LANCZOS, *self._known]

    def find(self, wanted: str | None, width: int, height: int) -> Upscaler | None:
        """The upscaler for "NAME" or "NAME:FACTOR" and images of this size; None for None.

        Raises RequestError for unknown names, factors out of range and results that are too large.
        """
        if wanted is None:
            return None
        name, colon, said = wanted.partition(":")
        if name not in self.names:
            raise RequestError(f"upscale: got {name!r}, {closest(name, self.names)}; others come by add_upscaler()")
        if colon and not re.fullmatch(r"\d+(\.\d*)?|\.\d+", said):
            raise RequestError(f"upscale: got {wanted!r}, expected NAME or NAME:FACTOR such as {name}:2")
        if name == LANCZOS and not colon:
            raise RequestError("upscale: lanczos takes any factor: say which, such as 'lanczos:2'")
        found = self._known.get(name) or Lanczos(float(said))
        factor = float(said) if colon else found.scale
        if not 0 < factor <= MOST_SCALE:
            raise RequestError(f"upscale: got a factor of {factor:g}, expected above 0, up to {MOST_SCALE}")
        largest = max(factor, found.scale)
        if math.ceil(width * largest) * math.ceil(height * largest) > MOST_PIXELS:
            raise RequestError(
                f"upscale: {width} x {height} pixels enlarged by {largest:g} are more than {MOST_PIXELS}; use less"
            )
        return found if factor == found.scale else Resized(found, factor)
