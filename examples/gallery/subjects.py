"""What the gallery paints: scene i is drawn by random numbers of seed i, and so is what is asked for in its place."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np

from ..shapes.render import render
from ..shapes.scenes import BACKGROUNDS, OBJECT_COLORS, SHAPES, SIZE, Scene, pair, sample_pair, sample_single, single

TURNED = {"left of": "above", "above": "right of", "right of": "below", "below": "left of"}


def any_scene(seed: int) -> Scene:
    """One object, or two."""
    rng = random.Random(seed)
    return sample_pair(rng) if seed % 2 else sample_single(rng)


def side_by_side(seed: int) -> tuple[Scene, Scene]:
    """Two objects beside each other, and the same scene in two other colors."""
    rng = random.Random(seed)
    background = rng.choice(BACKGROUNDS)
    colors = rng.sample([c for c in OBJECT_COLORS if c != background], 4)
    scene = pair(rng, (colors[0], rng.choice(SHAPES), "left of", colors[1], rng.choice(SHAPES)), background)
    return scene, _colored(scene, colors[2:])


def recolored_and_turned(seed: int) -> tuple[Scene, Scene, Scene]:
    """Two objects, the same in other colors, and those colors a quarter turn further (left of becomes above)."""
    rng = random.Random(seed)
    scene = sample_pair(rng)
    assert scene.relation is not None
    free = [c for c in OBJECT_COLORS if c not in (scene.background, *(item.color for item in scene.items))]
    there = _colored(scene, rng.sample(free, 2))
    a, b = there.items
    return scene, there, pair(rng, (a.color, a.shape, TURNED[scene.relation], b.color, b.shape), scene.background)


def one_exchanged(seed: int) -> tuple[Scene, Scene]:
    """Two objects, and the same with another color and shape of the second one."""
    rng = random.Random(seed)
    scene = sample_pair(rng)
    first, second = scene.items
    color = rng.choice([c for c in OBJECT_COLORS if c not in (second.color, scene.background)])
    shape = rng.choice([s for s in SHAPES if s != second.shape])
    return scene, replace(scene, items=(first, replace(second, color=color, shape=shape)))


def large_object(seed: int) -> Scene:
    """One large object on white."""
    rng = random.Random(seed)
    return single(rng, rng.choice(OBJECT_COLORS), rng.choice(SHAPES), "white", "center", "large")


def picture(scene: Scene) -> np.ndarray:
    """The scene drawn, not painted: float32 [64, 64, 3] in 0..1."""
    return np.ascontiguousarray(render([scene])[0].transpose(1, 2, 0))


def half(place: str) -> tuple[slice, slice]:
    """The rows and columns of the half at a place; its border lies between two latent sites."""
    low, high, whole = slice(0, SIZE // 2), slice(SIZE // 2, SIZE), slice(0, SIZE)
    return {"left": (whole, low), "right": (whole, high), "top": (low, whole), "bottom": (high, whole)}[place]


def half_mask(place: str) -> np.ndarray:
    """float32 [64, 64]: 1 in that half."""
    mask = np.zeros((SIZE, SIZE), np.float32)
    mask[half(place)] = 1
    return mask


def _colored(scene: Scene, colors: list[str]) -> Scene:
    items = tuple(replace(item, color=color) for item, color in zip(scene.items, colors, strict=True))
    return replace(scene, items=items)
