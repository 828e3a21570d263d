"""The little world of the `shapes` model: what a scene is, how it is sampled and how it is put into words.

A scene has a background and one or two objects. Coordinates and radii are in pixels of a 64x64 image, y downwards.
Two objects stand in one of four relations; a combination (color, shape, relation, color, shape) and its mirror image
("A above B" is "B below A") are the same picture, so both are held out together.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

SIZE = 64
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (250, 220, 50),
    "green": (40, 165, 70),
    "cyan": (60, 205, 215),
    "blue": (40, 80, 215),
    "purple": (135, 55, 170),
    "pink": (250, 140, 185),
    "white": (248, 248, 248),
    "gray": (130, 130, 135),
    "black": (20, 20, 24),
}
OBJECT_COLORS = tuple(COLORS)[:8]
BACKGROUNDS = ("white", "gray", "black", "yellow", "green", "blue", "purple", "pink")
SHAPES = ("circle", "square", "triangle")
PLACES = ("center", "left", "right", "top", "bottom")
SIZES = ("small", "medium", "large")
OFFSET = 15.5
PLACE_OFFSETS = {"center": (0, 0), "left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}
RELATIONS: dict[str, tuple[str, str]] = {
    "left of": ("left", "right"),
    "right of": ("right", "left"),
    "above": ("top", "bottom"),
    "below": ("bottom", "top"),
}
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
RELATION_WORDS = {
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over", "on top of"),
    "below": ("below", "under", "beneath"),
}
PLACE_WORDS = {
    "left": ("on the left", "at the left"),
    "right": ("on the right", "at the right"),
    "top": ("at the top", "on the top"),
    "bottom": ("at the bottom", "on the bottom"),
}
OPENINGS = ("", "", "", "", "a picture of ", "an image of ", "a drawing of ", "there is ")
WORDS = tuple(
    sorted(
        {word for phrases in (*RELATION_WORDS.values(), *PLACE_WORDS.values()) for p in phrases for word in p.split()}
        | {word for opening in OPENINGS for word in opening.split()}
        | set(["a", "an", "the", "with", "and", "in", "center", "middle", "background"])
        | set(SIZES)
        | set(COLORS)
        | set(SHAPES)
    )
)
HELDOUT_FILE = Path(__file__).with_name("heldout.json")

Combination = tuple[str, str, str, str, str]


@dataclass(frozen=True)
class Item:
    """One object: color and shape by name, the place it stands at, its center (x, y) and radius r in pixels."""

    color: str
    shape: str
    place: str
    x: float
    y: float
    r: float


@dataclass(frozen=True)
class Scene:
    """A picture in symbols. `size` is what was asked of a single object; `relation` is set for two objects."""

    background: str
    items: tuple[Item, ...]
    relation: str | None = None
    size: str = "medium"

    @property
    def combination(self) -> Combination | None:
        """(color, shape, relation, color, shape) of a two-object scene, None for a single object."""
        if self.relation is None:
            return None
        a, b = self.items
        return (a.color, a.shape, self.relation, b.color, b.shape)


def all_combinations() -> list[Combination]:
    """Every (color, shape, relation, color, shape), 2304 of them, in a fixed order."""
    things = [(color, shape) for color in OBJECT_COLORS for shape in SHAPES]
    return [(*a, relation, *b) for a in things for relation in RELATIONS for b in things]


def mirrored(combination: Combination) -> Combination:
    """The same picture said the other way round: "A above B" becomes "B below A"."""
    color_a, shape_a, relation, color_b, shape_b = combination
    return (color_b, shape_b, INVERSE[relation], color_a, shape_a)


def choose_heldout(fraction: float = 0.15, seed: int = 0) -> list[Combination]:
    """The combinations training must not see: `fraction` of all, each together with its mirror image."""
    pictures = sorted({min(c, mirrored(c)) for c in all_combinations()})
    chosen = random.Random(seed).sample(pictures, round(fraction * len(pictures)))
    return sorted({d for c in chosen for d in (c, mirrored(c))})


def load_heldout() -> frozenset[Combination]:
    """The committed list `heldout.json` (equal to `choose_heldout()`, which a test checks)."""
    return frozenset(tuple(row) for row in json.loads(HELDOUT_FILE.read_text()))


def single(
    rng: random.Random, color: str, shape: str, background: str, place: str = "center", size: str = "medium"
) -> Scene:
    """One object: in the center with any size, or at another place with the size objects have in pairs."""
    if place == "center":
        low, high = {"small": (8.0, 9.0), "medium": (13.0, 15.0), "large": (20.0, 22.0)}[size]
        jitter = 2.0
    else:
        low, high, jitter = 10.0, 11.2, 1.2
    return Scene(background, (_item(rng, color, shape, place, rng.uniform(low, high), jitter),), None, size)


def pair(rng: random.Random, combination: Combination, background: str) -> Scene:
    """Two objects in a relation."""
    color_a, shape_a, relation, color_b, shape_b = combination
    items = tuple(
        _item(rng, color, shape, place, rng.uniform(10.0, 11.2), 1.2)
        for (color, shape), place in zip(((color_a, shape_a), (color_b, shape_b)), RELATIONS[relation], strict=True)
    )
    return Scene(background, items, relation)


def _item(rng: random.Random, color: str, shape: str, place: str, r: float, jitter: float) -> Item:
    dx, dy = PLACE_OFFSETS[place]
    x = SIZE / 2 + OFFSET * dx + rng.uniform(-jitter, jitter)
    y = SIZE / 2 + OFFSET * dy + rng.uniform(-jitter, jitter)
    return Item(color, shape, place, x, y, r)


def sample_single(rng: random.Random) -> Scene:
    """A random single-object scene."""
    background = _background(rng)
    color = rng.choice([c for c in OBJECT_COLORS if c != background])
    place = rng.choice(PLACES) if rng.random() < 0.5 else "center"
    size = rng.choice(SIZES) if place == "center" and rng.random() < 0.5 else "medium"
    return single(rng, color, rng.choice(SHAPES), background, place, size)


def sample_pair(rng: random.Random, heldout: frozenset[Combination] = frozenset()) -> Scene:
    """A random two-object scene whose combination is not in `heldout`."""
    while True:
        background = _background(rng)
        colors = [c for c in OBJECT_COLORS if c != background]
        combination = (
            rng.choice(colors),
            rng.choice(SHAPES),
            rng.choice(tuple(RELATIONS)),
            rng.choice(colors),
            rng.choice(SHAPES),
        )
        if combination not in heldout:
            return pair(rng, combination, background)


def _background(rng: random.Random) -> str:
    return "white" if rng.random() < 0.3 else rng.choice(BACKGROUNDS)


def caption(scene: Scene, rng: random.Random | None = None) -> str:
    """One of the ways to say a scene; without `rng` the plainest one. A white background need not be named."""
    pick = rng.choice if rng else (lambda options: options[0])
    nouns = [_noun(item, scene.size) for item in scene.items]
    if scene.relation:
        text = f"{nouns[0]} {pick(RELATION_WORDS[scene.relation])} {nouns[1]}"
    elif scene.items[0].place == "center":
        text = nouns[0]
    else:
        text = f"{nouns[0]} {pick(PLACE_WORDS[scene.items[0].place])}"
    if scene.background != "white" or (rng and rng.random() < 0.35):
        text += pick((" on a {0} background", " on a {0} background", " with a {0} background")).format(
            scene.background
        )
    return pick(OPENINGS) + text


def _noun(item: Item, size: str) -> str:
    words = [item.color, item.shape] if size == "medium" else [size, item.color, item.shape]
    return ("an " if words[0][0] in "aeiou" else "a ") + " ".join(words)


if __name__ == "__main__":
    rows = ",\n".join(json.dumps(row) for row in choose_heldout())
    HELDOUT_FILE.write_text(f"[\n{rows}\n]\n")
