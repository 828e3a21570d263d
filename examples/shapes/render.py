"""Draws scenes as anti-aliased images, 64x64 or windows of larger ones, through signed distances in pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .scenes import COLORS, SIZE, Item, Scene

RGB = {name: np.array(value, np.float32) / 255 for name, value in COLORS.items()}
Form = Callable[[str, np.ndarray, np.ndarray, float], np.ndarray]
"""How a shape looks: (shape, x, y, r) to distances, as `signed_distance` has them; others are in styles.py."""
_Y, _X = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) + 0.5


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    """Approximate distance in pixels to the outline, negative inside; x, y relative to the center, y downwards."""
    if shape == "circle":
        return np.sqrt(x * x + y * y) - r
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.86 * r
    if shape == "triangle":
        slope = 1.8
        sides = (slope * np.abs(x) - (y + r)) / np.sqrt(slope**2 + 1)
        return np.maximum(y - 0.8 * r, sides)
    raise ValueError(f"got shape {shape!r}; expected circle, square or triangle")


def coverage(item: Item, form: Form = signed_distance) -> np.ndarray:
    """The share of each pixel an object covers, [64, 64] float32 in 0..1."""
    return np.clip(0.5 - form(item.shape, _X - item.x, _Y - item.y, item.r), 0.0, 1.0)


def render(scenes: Sequence[Scene], form: Form = signed_distance) -> np.ndarray:
    """Images of the scenes, float32 [B, 3, 64, 64] in 0..1."""
    images = np.empty((len(scenes), 3, SIZE, SIZE), np.float32)
    for image, scene in zip(images, scenes, strict=True):
        image[:] = RGB[scene.background][:, None, None]
        for item in scene.items:
            alpha = coverage(item, form)
            image += alpha * (RGB[item.color][:, None, None] - image)
    return images


def render_window(scene: Scene, *, scale: int, left: int, top: int, side: int) -> np.ndarray:
    """A square window of the scene drawn `scale` times as large, float32 [3, side, side] in 0..1.

    left, top and side are in pixels of the large image, whose side is 64 * scale. Edges are one large pixel wide: the
    window is what a finer renderer would have drawn, not an enlarged picture.
    """
    x = np.arange(left, left + side, dtype=np.float32)[None, :] + 0.5
    y = np.arange(top, top + side, dtype=np.float32)[:, None] + 0.5
    image = np.empty((3, side, side), np.float32)
    image[:] = RGB[scene.background][:, None, None]
    for item in scene.items:
        distance = signed_distance(item.shape, x - scale * item.x, y - scale * item.y, scale * item.r)
        image += np.clip(0.5 - distance, 0.0, 1.0) * (RGB[item.color][:, None, None] - image)
    return image
