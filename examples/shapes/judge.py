"""Reads a picture back into colors, shapes and places, and compares it with what a prompt asked for.

Pixels only (numpy and scipy), nothing of the engine: background from the border, objects as connected regions that
differ from it, colors by the nearest palette entry, shapes by overlap with templates in the object's own bounding box.
A picture of 128x128, 192x192, ... is judged at its own size: what is said in pixels below is pixels of a 64x64 one.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy import ndimage

from .render import RGB, Form, render, signed_distance
from .scenes import (
    BACKGROUNDS,
    OBJECT_COLORS,
    RELATIONS,
    SHAPES,
    SIZE,
    Scene,
    pair,
    sample_pair,
    sample_single,
    single,
)

NAMES = tuple(RGB)
PALETTE = np.stack([RGB[name] for name in NAMES])
FOREGROUND_DISTANCE = 0.2
COLOR_DISTANCE = 0.2
MIN_AREA = 16
MIN_OVERLAP = 0.8
TEMPLATE = 24


@dataclass(frozen=True)
class Seen:
    """One object found in a picture: color, shape, overlap with its template, center and width in 64x64 pixels."""

    color: str
    shape: str
    overlap: float
    x: float
    y: float
    width: float


@dataclass(frozen=True)
class Verdict:
    """What of a scene is right. `right` needs all of background, count, colors, shapes and relation (or place)."""

    background: bool
    count: bool
    colors: bool
    shapes: bool
    relation: bool
    size: bool

    @property
    def right(self) -> bool:
        return self.background and self.count and self.colors and self.shapes and self.relation


def nearest_color(rgb: np.ndarray) -> str:
    """The palette color closest to an RGB triple in 0..1, "" when none is near."""
    distance = np.linalg.norm(PALETTE - rgb, axis=1)
    return NAMES[distance.argmin()] if distance.min() < COLOR_DISTANCE else ""


def stretched(mask: np.ndarray, side: int = TEMPLATE) -> np.ndarray:
    """A mask's bounding box resampled to [side, side]: shape without place and size."""
    ys, xs = np.nonzero(mask)
    rows = ys.min() + (np.arange(side) + 0.5) * (ys.max() + 1 - ys.min()) / side
    columns = xs.min() + (np.arange(side) + 0.5) * (xs.max() + 1 - xs.min()) / side
    return mask[rows.astype(int)[:, None], columns.astype(int)]


@cache
def templates(side: int = TEMPLATE, form: Form = signed_distance) -> dict[str, np.ndarray]:
    """The shapes as masks [side, side]."""
    return {shape: stretched(_large(shape, form), side) for shape in SHAPES}


@cache
def heightened(shape: str, form: Form) -> float:
    """Height by width of a shape in this form, as a multiple of what it is in the plain one."""
    tall, plain = (np.ptp(np.nonzero(_large(shape, f)), axis=1) + 1 for f in (form, signed_distance))
    return float(tall[0] * plain[1] / (tall[1] * plain[0]))


def _large(shape: str, form: Form) -> np.ndarray:
    y, x = np.mgrid[0:256, 0:256] - 127.5
    return form(shape, x, y, 100.0) < 0


def look(image: np.ndarray, form: Form = signed_distance) -> tuple[str, list[Seen]]:
    """Background color and objects of an RGB image [64 k, 64 k, 3] float in 0..1, k = 1, 2, ...

    form: how the shapes are drawn, where not as ever (styles.py).
    """
    scale = image.shape[0] // SIZE
    wide = 2 * scale
    edges = (image[:wide], image[-wide:], image[:, :wide], image[:, -wide:])
    border = np.concatenate([edge.reshape(-1, 3) for edge in edges])
    ground = np.median(border, axis=0)
    different = np.linalg.norm(image - ground, axis=2) > FOREGROUND_DISTANCE
    regions: np.ndarray = np.zeros(different.shape, np.int32)
    count = ndimage.label(different, output=regions)
    objects = []
    for index in range(1, count + 1):
        mask = regions == index
        if mask.sum() >= MIN_AREA * scale**2:
            objects.append(_describe(image, mask, ground, scale, form))
    return nearest_color(ground), objects


def _describe(image: np.ndarray, mask: np.ndarray, ground: np.ndarray, scale: int, form: Form) -> Seen:
    core = ndimage.binary_erosion(mask, iterations=2 * scale)
    rgb = np.median(image[core if core.sum() >= 10 * scale**2 else mask], axis=0)
    # The outline is where a pixel is half object, half background: faint edge pixels would stretch the bounding box.
    share = (image - ground) @ (rgb - ground) / np.sum((rgb - ground) ** 2)
    mask = mask & (share > 0.5)
    color, own = nearest_color(rgb), stretched(mask, TEMPLATE * scale)
    overlaps = {name: (own & t).sum() / (own | t).sum() for name, t in templates(TEMPLATE * scale, form).items()}
    shape = max(overlaps, key=overlaps.__getitem__)
    ys, xs = np.nonzero(mask)
    height, width = np.ptp(ys) + 1, np.ptp(xs) + 1
    if not 0.7 < height / width / heightened(shape, form) < 1.4:
        shape = ""
    return Seen(
        color,
        shape,
        float(overlaps.get(shape, 0.0)),
        ((xs.min() + xs.max() + 1) / scale - 1) / 2,
        ((ys.min() + ys.max() + 1) / scale - 1) / 2,
        float(width / scale),
    )


def judge(image: np.ndarray, scene: Scene, form: Form = signed_distance) -> Verdict:
    """Compare an image [64 k, 64 k, 3] (float 0..1 or uint8, k = 1, 2, ...) with a scene drawn in a form."""
    side = image.shape[0]
    if image.shape != (side, side, 3) or side < SIZE or side % SIZE:
        raise ValueError(
            f"got an image of shape {image.shape}; expected ({SIZE}, {SIZE}, 3) or a multiple: render at 64x64"
        )
    image = image.astype(np.float32) / 255 if image.dtype == np.uint8 else image
    background, seen = look(image, form)
    count = len(seen) == len(scene.items)
    if not count:
        return Verdict(background == scene.background, False, False, False, False, False)
    seen = _in_order(seen, scene)
    return Verdict(
        background=background == scene.background,
        count=True,
        colors=all(s.color == item.color for s, item in zip(seen, scene.items, strict=True)),
        shapes=all(
            s.shape == item.shape and s.overlap > MIN_OVERLAP for s, item in zip(seen, scene.items, strict=True)
        ),
        relation=bool(_relation_holds(seen, scene)),
        size=bool(_size_fits(seen, scene)),
    )


def _in_order(seen: list[Seen], scene: Scene) -> list[Seen]:
    """The objects in the order of the prompt: the assignment that makes most attributes right."""

    def score(objects: Sequence[Seen]) -> int:
        return sum(
            2 * (s.color == item.color) + 2 * (s.shape == item.shape)
            for s, item in zip(objects, scene.items, strict=True)
        ) + _relation_holds(objects, scene)

    return max([seen, seen[::-1]], key=score)


def _relation_holds(seen: Sequence[Seen], scene: Scene) -> bool:
    if scene.relation is None:
        (s,) = seen
        dx, dy = s.x - (SIZE - 1) / 2, s.y - (SIZE - 1) / 2
        sideways = {"left": -dx, "right": dx, "top": -dy, "bottom": dy}.get(scene.items[0].place)
        if sideways is None:
            return max(abs(dx), abs(dy)) < 8
        return sideways > 8
    a, b = seen
    dx, dy = b.x - a.x, b.y - a.y
    return {"left of": dx > abs(dy), "right of": -dx > abs(dy), "above": dy > abs(dx), "below": -dy > abs(dx)}[
        scene.relation
    ]


def _size_fits(seen: Sequence[Seen], scene: Scene) -> bool:
    if scene.relation or scene.items[0].place != "center":
        low, high = 8.0, 13.5
    else:
        low, high = {"small": (6.0, 11.0), "medium": (11.0, 17.5), "large": (17.5, 26.0)}[scene.size]
    # A square of "radius" r has the half side 0.86 r, see render.signed_distance.
    return all(low < s.width / (1.72 if s.shape == "square" else 2.0) < high for s in seen)


def altered(scene: Scene, rng: random.Random) -> Scene:
    """The scene with exactly one thing that matters changed: a color, a shape, the relation or the background."""
    what = rng.choice(("color", "shape", "background", *(("relation",) if scene.relation else ())))
    taken = {item.color for item in scene.items}
    if what == "background":
        background = rng.choice([b for b in BACKGROUNDS if b != scene.background and b not in taken])
        return Scene(background, scene.items, scene.relation, scene.size)
    if what == "relation":
        relation = rng.choice([r for r in RELATIONS if r != scene.relation])
        a, b = scene.items
        new = pair(rng, (a.color, a.shape, relation, b.color, b.shape), scene.background)
        same = (a.color, a.shape) == (b.color, b.shape) and {scene.relation, relation} in (
            {"left of", "right of"},
            {"above", "below"},
        )
        return altered(scene, rng) if same else new
    index = rng.randrange(len(scene.items))
    things = [[item.color, item.shape] for item in scene.items]
    options = [c for c in OBJECT_COLORS if c not in (things[index][0], scene.background)]
    if what == "color":
        things[index][0] = rng.choice(options)
    else:
        things[index][1] = rng.choice([s for s in SHAPES if s != things[index][1]])
    if scene.relation:
        (color_a, shape_a), (color_b, shape_b) = things
        return pair(rng, (color_a, shape_a, scene.relation, color_b, shape_b), scene.background)
    return single(rng, *things[0], scene.background, scene.items[0].place, scene.size)


def self_test(count: int = 1000, seed: int = 0) -> tuple[float, float]:
    """Share of rendered scenes judged right, and share of pictures accepted for a scene different in one thing."""
    rng = random.Random(seed)
    scenes = [sample_single(rng) if rng.random() < 0.5 else sample_pair(rng) for _ in range(count)]
    images = render(scenes).transpose(0, 2, 3, 1)
    right = sum(judge(image, scene).right for image, scene in zip(images, scenes, strict=True))
    wrong = sum(judge(image, altered(scene, rng)).right for image, scene in zip(images, scenes, strict=True))
    return right / count, wrong / count


if __name__ == "__main__":
    print("right {:.1%}, wrong accepted {:.1%}".format(*self_test()))
