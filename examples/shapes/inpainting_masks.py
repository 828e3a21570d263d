"""What an inpainting model learns to fill in: halves and strips, rectangles, surroundings of objects, brush strokes."""

from __future__ import annotations

import random

import numpy as np

from .latents import CELL
from .render import signed_distance
from .scenes import SIZE, Item, Scene

_Y, _X = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) + 0.5
KINDS = {"object": 0.3, "side": 0.25, "rectangle": 0.2, "strokes": 0.15, "everything": 0.1}
MARGINS = (3.0, 10.0)  # pixels round an object
STROKES = (6.0, 14.0)  # widths in pixels


def sample_mask(rng: random.Random, scene: Scene) -> np.ndarray:
    """A random mask for a scene, float32 [64, 64]: 1 where the picture is painted anew. Some latent site is in it."""
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    while True:
        if kind == "object":
            mask = _surroundings(rng, rng.choice(scene.items))
        elif kind == "side":
            mask = _side(rng)
        elif kind == "rectangle":
            mask = _rectangle(rng)
        elif kind == "strokes":
            mask = _strokes(rng)
        else:
            mask = np.ones((SIZE, SIZE), bool)
        if mask[::CELL, ::CELL].any():
            return mask.astype(np.float32)


def around(item: Item, margin: float) -> np.ndarray:
    """bool [64, 64]: the square round an object, `margin` pixels away from its circle. It does not tell the shape."""
    return np.maximum(np.abs(_X - item.x), np.abs(_Y - item.y)) < item.r + margin


def _surroundings(rng: random.Random, item: Item) -> np.ndarray:
    """A square, a disc or the object's own shape, larger than the object by a margin."""
    margin = rng.uniform(*MARGINS)
    if rng.random() < 0.5:
        return around(item, margin)
    shape = rng.choice(("circle", item.shape))
    return signed_distance(shape, _X - item.x, _Y - item.y, item.r) < margin


def _side(rng: random.Random) -> np.ndarray:
    """All from a line on, as when a picture is made larger; half of the lines are in the middle."""
    width = SIZE / 2 if rng.random() < 0.5 else rng.uniform(12, 52)
    mask = width > _X if rng.random() < 0.5 else width > _Y
    return mask if rng.random() < 0.5 else mask[::-1, ::-1]


def _rectangle(rng: random.Random) -> np.ndarray:
    wide, high = rng.uniform(14, 52), rng.uniform(14, 52)
    left, top = rng.uniform(-4, SIZE + 4 - wide), rng.uniform(-4, SIZE + 4 - high)
    return (left <= _X) & (left + wide > _X) & (top <= _Y) & (top + high > _Y)


def _strokes(rng: random.Random) -> np.ndarray:
    """One to three thick lines between random points."""
    mask = np.zeros((SIZE, SIZE), bool)
    for _ in range(rng.randint(1, 3)):
        (x0, y0), (x1, y1) = ((rng.uniform(0, SIZE), rng.uniform(0, SIZE)) for _ in range(2))
        dx, dy = x1 - x0, y1 - y0
        along = np.clip(((_X - x0) * dx + (_Y - y0) * dy) / max(dx * dx + dy * dy, 1e-6), 0, 1)
        mask |= np.hypot(_X - x0 - along * dx, _Y - y0 - along * dy) < rng.uniform(*STROKES) / 2
    return mask
