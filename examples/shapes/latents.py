"""The latent space of `shapes`, in closed form: what an 8x8 grid of cells must say for a scene to be drawn again.

Eight channels per cell of 8x8 pixels: the color (of the object where one is near, else of the background), and the
squashed signed distance to the nearest outline at the cell's center and at the centers of its four quarters. Encoder
and decoder are trained to read and to draw this code. Learning the code itself was tried first: in the time two CPU
cores have, a free autoencoder blurred neighboring colors (red and orange, blue and cyan) and a third of its own
reconstructions was judged wrong; here colors and outlines have channels of their own, which a denoiser can use too.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .render import RGB, Form, signed_distance
from .scenes import SIZE, Scene

CELL = 8
GRID = SIZE // CELL
CHANNELS = 8
SOFTNESS = 4.0  # pixels: distances beyond twice this look the same
_MEAN = np.array([0.5, 0.5, 0.5, -0.5, -0.5, -0.5, -0.5, -0.5], np.float32)
_STD = np.array([0.35, 0.35, 0.35, 0.65, 0.65, 0.65, 0.65, 0.65], np.float32)


def _sample_points() -> tuple[np.ndarray, np.ndarray]:
    """x and y of the five points of each cell, [5, 8, 8] float32: the center, then the quarters row by row."""
    corner = CELL * np.arange(GRID, dtype=np.float32)
    offsets = [(CELL / 2, CELL / 2)] + [(dx, dy) for dy in (2, 6) for dx in (2, 6)]
    x = np.stack([np.broadcast_to(corner[None, :] + dx, (GRID, GRID)) for dx, _ in offsets])
    y = np.stack([np.broadcast_to(corner[:, None] + dy, (GRID, GRID)) for _, dy in offsets])
    return x, y


_X, _Y = _sample_points()


def encode_scene(scene: Scene, form: Form = signed_distance) -> np.ndarray:
    """The latents of a scene, float32 [8, 8, 8] (channels, rows, columns), about zero mean and unit deviation."""
    latents = np.empty((CHANNELS, GRID, GRID), np.float32)
    latents[:3] = RGB[scene.background][:, None, None]
    nearest = np.full(_X.shape, np.inf, np.float32)
    for item in scene.items:
        distance = form(item.shape, _X - item.x, _Y - item.y, item.r)
        # A cell takes the object's color from where the outline comes within some three pixels of its sample points.
        near = np.clip(1 - distance.min(0) / 3, 0, 1)
        latents[:3] += near * (RGB[item.color][:, None, None] - latents[:3])
        nearest = np.minimum(nearest, distance)
    latents[3:] = -np.tanh(nearest / SOFTNESS)
    return (latents - _MEAN[:, None, None]) / _STD[:, None, None]


def encode_scenes(scenes: Sequence[Scene], form: Form = signed_distance) -> np.ndarray:
    """Latents of several scenes, float32 [B, 8, 8, 8]."""
    return np.stack([encode_scene(scene, form) for scene in scenes])
