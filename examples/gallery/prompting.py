"""Features of the gallery that are about prompts alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from stepfuse import Engine, Request

from ..shapes.judge import look
from ..shapes.scenes import caption
from .exhibit import SHOWN, Exhibit, Score, call, paint, right
from .strip import Row, Tile
from .subjects import any_scene

WEIGHTS = (0.4, 0.8, 1.0, 1.2, 1.6)
SCALES = (1.0, 2.0, 3.0, 5.0, 10.0, 20.0)


def text_to_image(engine: Engine, n: int | None) -> Exhibit:
    """Prompts of the model's own grammar."""
    scenes = [any_scene(seed) for seed in range(n or 50)]
    requests = [Request(prompt=caption(scene), seed=seed) for seed, scene in enumerate(scenes)]
    images = paint(engine, requests)
    fits = right(images, scenes)
    tiles = [Tile(r.prompt or "", image, fit) for r, image, fit in zip(requests, images, fits, strict=True)]
    return Exhibit(
        "Text to image",
        "Default settings: DDIM, 20 updates, guidance 3.",
        call(requests[0]),
        [Row("", tiles[start : start + 6]) for start in range(0, min(len(tiles), 12), 6)],
        [Score.of_all("right: background, number, colors, shapes, relation", fits)],
    )


def prompt_weighting(engine: Engine, n: int | None) -> Exhibit:
    """Two colors for one object: the heavier word wins."""
    count = n or 16
    requests = {
        weight: [Request(prompt=f"a (red:{weight:g}) (blue:{2 - weight:g}) circle", seed=seed) for seed in range(count)]
        for weight in WEIGHTS
    }
    images = {weight: paint(engine, asked) for weight, asked in requests.items()}
    colors = {weight: [_color(image) for image in made] for weight, made in images.items()}
    scores = [
        Score.of_all(f"one {color} circle", [c == color for c in colors[weight]], f"`{requests[weight][0].prompt}`")
        for weight in WEIGHTS
        for color in ("red", "blue")
    ]
    rows = [
        Row(f"seed {seed}", [Tile(requests[weight][0].prompt or "", images[weight][seed]) for weight in WEIGHTS])
        for seed in range(min(SHOWN, count))
    ]
    text = "Two words that contradict each other, with weights that sum to 2. What is neither is a mixture."
    return Exhibit("Prompt weights", text, call(requests[WEIGHTS[-1]][0]), rows, scores)


def negative_prompt(engine: Engine, n: int | None) -> Exhibit:
    """A color that the prompt leaves open, excluded."""
    shapes = ("circle", "square", "triangle")
    plain = [Request(prompt=f"a {shapes[seed % 3]}", seed=seed) for seed in range(n or 30)]
    painted = [(asked, image, _color(image)) for asked, image in zip(plain, paint(engine, plain), strict=True)]
    painted = [one for one in painted if one[2]]
    requests = [
        replace(asked, negative_prompt=_noun(color, shapes[(asked.seed or 0) % 3])) for asked, _, color in painted
    ]
    images = paint(engine, requests)
    tiles = [
        (Tile(asked.prompt or "", before), Tile(f"negative: {asked.negative_prompt}", after))
        for asked, (_, before, _), after in zip(requests, painted, images, strict=True)
    ]
    rows = [Row("", [tile for pair in tiles[start : start + 3] for tile in pair])
            for start in range(0, min(len(tiles), 6), 3)]  # fmt: skip
    changed = [_color(image) not in ("", color) for image, (_, _, color) in zip(images, painted, strict=True)]
    kept = [
        [f"a {s.shape}" for s in look(image)[1]] == [asked.prompt]
        for image, asked in zip(images, requests, strict=True)
    ]
    text = (
        "The prompt names no color. The color that came out is read from the picture, and the same seed is painted "
        "again with that color in the negative prompt."
    )
    scores = [
        Score.of_all("one object of another color of the palette", changed),
        Score.of_all("still one object of the shape that was asked for", kept),
    ]
    return Exhibit("Negative prompt", text, call(requests[0]), rows, scores)


def guidance(engine: Engine, n: int | None) -> Exhibit:
    """The same prompts and seeds at several guidance scales."""
    scenes = [any_scene(seed) for seed in range(n or 20)]
    requests = {
        scale: [Request(prompt=caption(scene), seed=seed, guidance_scale=scale) for seed, scene in enumerate(scenes)]
        for scale in SCALES
    }
    images = {scale: paint(engine, asked) for scale, asked in requests.items()}
    fits = {scale: right(made, scenes) for scale, made in images.items()}
    rows = [
        Row(caption(scene), [Tile(f"guidance {scale:g}", images[scale][i], fits[scale][i]) for scale in SCALES])
        for i, scene in enumerate(scenes[:SHOWN])
    ]
    scores = [Score.of_all("right", fits[scale], f"guidance {scale:g}") for scale in SCALES]
    text = "The same noise at several scales. 1 runs no second branch; very large ones leave what the model knows."
    return Exhibit("Guidance scale", text, call(requests[SCALES[-1]][0]), rows, scores)


def _noun(color: str, shape: str) -> str:
    return f"{'an' if color[0] in 'aeiou' else 'a'} {color} {shape}"


def _color(image: np.ndarray) -> str:
    """Of the only object, "" where there is none, several, or no color of the palette."""
    seen = look(image)[1]
    return seen[0].color if len(seen) == 1 else ""
