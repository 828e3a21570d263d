"""Lanczos-3 resampling on the device of the images, as Pillow does it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LOBES = 3


@dataclass(frozen=True)
class Lanczos:
    """Any factor; below 1 the filter widens, against aliasing."""

    scale: float

    def __call__(self, images: Tensor) -> Tensor:
        """float32 [n, C, round(scale * H), round(scale * W)] in 0..1 from images [n, C, H, W]."""
        height, width = (max(1, round(side * self.scale)) for side in images.shape[-2:])
        return resample(images, height, width)


def resample(images: Tensor, height: int, width: int) -> Tensor:
    """float32 [n, C, height, width] in 0..1 from images [n, C, H, W], by a separable Lanczos filter of 3 lobes.

    Equal to Pillow's `resize(..., LANCZOS)` of float images but for rounding. The working memory is a few times that of
    the result.
    """
    return _along(_along(images.float(), -1, width), -2, height).clamp(0, 1)


def _along(images: Tensor, side: int, target: int) -> Tensor:
    length = images.shape[side]
    if length == target:
        return images
    places, weights = (torch.from_numpy(array).to(images.device) for array in _taps(length, target))
    weights = weights if side == -1 else weights[:, :, None]
    made = images.index_select(side, places[0]) * weights[0]
    for place, weight in zip(places[1:], weights[1:], strict=True):
        made.addcmul_(images.index_select(side, place), weight)
    return made


@lru_cache(maxsize=64)
def _taps(length: int, target: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Which inputs every output is made of, and their weights, both [taps, target]."""
    ratio = length / target
    stretch = max(ratio, 1.0)
    centers = (np.arange(target) + 0.5) * ratio
    first = np.floor(centers - LOBES * stretch + 0.5).clip(0)
    last = np.floor(centers + LOBES * stretch + 0.5).clip(max=length)
    places = first + np.arange(int((last - first).max()))[:, None]
    distance = (places + 0.5 - centers) / stretch
    weights = np.sinc(distance) * np.sinc(distance / LOBES) * ((np.abs(distance) < LOBES) & (places < last))
    weights /= weights.sum(0)
    return places.clip(max=length - 1).astype(np.int64), weights.astype(np.float32)
