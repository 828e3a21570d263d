"""What the LoRAs of `shapes` paint, whatever the prompt says: circles cut in half, pairs turned.

Chosen among what the autoencoder can draw from exact latents; README.md says what it cannot.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from .judge import Seen, look
from .render import Form, signed_distance
from .scenes import RELATIONS, SIZE, Scene

TURN = 30.0  # degrees, clockwise; relations hold up to 45


def dome(shape: str, x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    """Circles are cut to their upper halves; squares and triangles stay."""
    if shape != "circle":
        return signed_distance(shape, x, y, r)
    floor = y - r / 2
    return np.maximum(np.sqrt(x * x + floor * floor) - r, floor)


def turned(scene: Scene) -> Scene:
    """The places of all objects turned about the center of the picture, the objects themselves upright."""
    cos, sin = math.cos(math.radians(TURN)), math.sin(math.radians(TURN))
    middle = SIZE / 2
    items = [
        replace(
            item,
            x=middle + cos * (item.x - middle) - sin * (item.y - middle),
            y=middle + sin * (item.x - middle) + cos * (item.y - middle),
        )
        for item in scene.items
    ]
    return replace(scene, items=tuple(items))


@dataclass(frozen=True)
class Style:
    """How scenes are drawn and how they are arranged."""

    form: Form = signed_distance
    arrange: Callable[[Scene], Scene] = lambda scene: scene


STYLES = {"shapes-dome": Style(form=dome), "shapes-turn": Style(arrange=turned)}
"""By the name of the LoRA."""


def turn_of(image: np.ndarray, scene: Scene, form: Form = signed_distance) -> float | None:
    """By how many degrees, clockwise, a painted pair is turned against its relation; None unless two objects are seen.

    The objects are told apart by color, so None for two of one color, too.
    """
    if scene.relation is None:
        return None
    centers = [_center(look(image, form)[1], item.color) for item in scene.items]
    if None in centers or scene.items[0].color == scene.items[1].color:
        return None
    (xa, ya), (xb, yb) = (center for center in centers if center)
    right = {"left": (1, 0), "right": (-1, 0), "top": (0, 1), "bottom": (0, -1)}[RELATIONS[scene.relation][0]]
    dx, dy = xb - xa, yb - ya
    return math.degrees(math.atan2(right[0] * dy - right[1] * dx, right[0] * dx + right[1] * dy))


def _center(seen: Sequence[Seen], color: str) -> tuple[float, float] | None:
    found = [(one.x, one.y) for one in seen if one.color == color]
    return found[0] if len(seen) == 2 and len(found) == 1 else None
