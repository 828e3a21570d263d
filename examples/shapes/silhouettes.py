"""Scenes whose objects stand anywhere and have any size, their silhouettes, and how well a picture follows one."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy import ndimage

from .judge import FOREGROUND_DISTANCE, MIN_AREA, judge
from .render import coverage
from .scenes import SIZE, Combination, Item, Scene, sample_pair, sample_single

MARGIN = 3.0  # pixels between an object and the border
GAP = 4.0  # pixels between two objects, and by which a relation holds


def sample_free_scene(rng: random.Random, heldout: frozenset[Combination] = frozenset()) -> Scene:
    """One object or two, half each, at continuous places and sizes which the scene's caption does not tell.

    Two objects keep the relation of their caption; a single one is anywhere, its caption names no place.
    """
    if rng.random() < 0.5:
        scene = sample_single(rng)
        return Scene(scene.background, (_moved(rng, replace(scene.items[0], place="center"), 7.0, 22.0),))
    scene = sample_pair(rng, heldout)
    while True:
        a, b = (_moved(rng, item, 6.5, 13.0) for item in scene.items)
        dx, dy = b.x - a.x, b.y - a.y
        along = {"left of": dx, "right of": -dx, "above": dy, "below": -dy}[scene.relation or ""]
        across = min(abs(dx), abs(dy))
        if along == max(abs(dx), abs(dy)) and along > across + GAP and along > a.r + b.r + GAP:
            return replace(scene, items=(a, b))


def silhouette(scene: Scene) -> np.ndarray:
    """The objects white on black, [64, 64, 3] float32 in 0..1: a control picture without colors."""
    covered = np.max([coverage(item) for item in scene.items], axis=0)
    return np.repeat(covered[..., None].astype(np.float32), 3, axis=2)


def objects_of(image: np.ndarray) -> np.ndarray:
    """The pixels of objects in a picture [64, 64, 3] (float in 0..1), bool [64, 64].

    The outline is where a pixel is half as far from the background as its object is, as for the judge.
    """
    border = np.concatenate([edge.reshape(-1, 3) for edge in (image[:2], image[-2:], image[:, :2], image[:, -2:])])
    distance = np.linalg.norm(image - np.median(border, axis=0), axis=2)
    regions: np.ndarray = np.zeros(distance.shape, np.int32)
    count = ndimage.label(distance > FOREGROUND_DISTANCE, output=regions)
    found = np.zeros(distance.shape, bool)
    for index in range(1, count + 1):
        region = regions == index
        if region.sum() >= MIN_AREA:
            found |= region & (distance > np.median(distance[region]) / 2)
    return found


def overlap(image: np.ndarray, scene: Scene) -> float:
    """Intersection over union of the picture's objects and the scene's silhouette, 0..1."""
    found, wanted = objects_of(image), silhouette(scene)[..., 0] > 0.5
    return float((found & wanted).sum() / (found | wanted).sum())


def right(image: np.ndarray, scene: Scene) -> bool:
    """Whether a picture shows all that the caption of a free scene says; the place of one object is not said."""
    verdict = judge(image, scene)
    said = verdict.background and verdict.count and verdict.colors and verdict.shapes
    return said and (scene.relation is None or verdict.relation)


def score(images: Sequence[np.ndarray], scenes: Sequence[Scene]) -> tuple[int, float]:
    """How many pictures are right, and the mean overlap with the silhouettes."""
    pairs = list(zip(images, scenes, strict=True))
    return sum(right(*pair) for pair in pairs), float(np.mean([overlap(*pair) for pair in pairs]))


def _moved(rng: random.Random, item: Item, low: float, high: float) -> Item:
    r = rng.uniform(low, high)
    x, y = (rng.uniform(MARGIN + r, SIZE - MARGIN - r) for _ in range(2))
    return replace(item, x=x, y=y, r=r)
