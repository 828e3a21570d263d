"""Features of the gallery that change the model by small files: LoRAs and learned words."""

from __future__ import annotations

import random

import numpy as np

from stepfuse import Engine, Request

from ..shapes.judge import look
from ..shapes.scenes import OBJECT_COLORS, SHAPES, Scene, caption, sample_pair
from ..shapes.styles import TURN, dome, turn_of
from .exhibit import SHOWN, Exhibit, Score, call, paint, right
from .strip import Row, Tile

DOME, TURNED, SUN, BIG = "shapes-dome", "shapes-turn", "shapes-sun", "shapes-big"
LORAS: dict[str, list[tuple[str, float]]] = {
    "none": [],
    "dome 0.5": [(DOME, 0.5)],
    "dome 1": [(DOME, 1.0)],
    "turn 0.5": [(TURNED, 0.5)],
    "turn 1": [(TURNED, 1.0)],
    "dome 1, turn 1": [(DOME, 1.0), (TURNED, 1.0)],
}
SIZE_WORDS = ("small", "", "big", "large")
LOW, HIGH = 15.0, 20.0  # pixels: the radius of medium objects ends, that of large ones begins


def lora(engine: Engine, n: int | None) -> Exhibit:
    """Circles and pairs as two LoRAs change them, at several strengths and together."""
    scenes = [_circle_and_other(seed) for seed in range(n or 40)]
    requests = [Request(prompt=caption(scene), seed=seed) for seed, scene in enumerate(scenes)]
    images: dict[str, list[np.ndarray]] = {}
    for at, loras in LORAS.items():
        engine.set_loras(loras)
        images[at] = paint(engine, requests)
    engine.set_loras([])
    scores, turns, fits = [], {}, {}
    for at, loras in LORAS.items():
        whole, cut = right(images[at], scenes), right(images[at], scenes, dome)
        fits[at] = cut if (DOME, 1.0) in loras else whole
        found = [turn_of(image, scene, dome) for image, scene in zip(images[at], scenes, strict=True)]
        turns[at] = float(np.mean([angle for angle in found if angle is not None] or [0]))
        scores += [
            Score.of_all("right with whole circles", whole, at),
            Score.of_all("right with half circles", cut, at),
            Score.of_all(f"turned by {TURN / 2:g} to {1.5 * TURN:g} degrees", list(map(_is_turned, found)), at),
        ]
    rows = [
        Row(request.prompt or "", [Tile(at, images[at][i], fits[at][i]) for at in LORAS])
        for i, request in enumerate(requests[:SHOWN])
    ]
    means = ", ".join(f"{angle:.0f} ({at})" for at, angle in turns.items())
    text = (
        f"`{DOME}` cuts circles to their upper halves, `{TURNED}` turns the places of two objects by {TURN:g} degrees "
        "clockwise; no prompt says so. Both are 0.28 MB and were trained at strength 1 (examples/shapes/README.md). "
        "Right means everything the prompt says, with circles of that kind; relations hold up to 45 degrees. Mean turn "
        f"in degrees: {means}. Together, some circles come out flatter than half ones. A red frame is judged by half "
        f"circles where `{DOME}` has strength 1, by whole ones elsewhere."
    )
    said = f"engine.set_loras({LORAS['dome 1, turn 1']!r})\n{call(requests[0])}"
    return Exhibit("LoRA", text, said, rows, scores, side=112)


def textual_inversion(engine: Engine, n: int | None) -> Exhibit:
    """A word for a thing beside others, and a word for a size between two others."""
    suns = [_sun_and_other(seed) for seed in range(n or 40)]
    asked = [Request(prompt=caption(scene).replace("yellow circle", "sun"), seed=i) for i, scene in enumerate(suns)]
    sized = {size: [_one_of_size(seed, size) for seed in range(min(n or 20, 20))] for size in SIZE_WORDS}
    made = {"not learned": paint(engine, asked)}
    engine.set_embeddings([SUN, BIG])
    made["learned"] = paint(engine, asked)
    images = {size: paint(engine, those) for size, those in sized.items()}
    engine.set_embeddings([])
    fits = {at: right(found, suns) for at, found in made.items()}
    radii = {size: list(map(_radius, found)) for size, found in images.items()}
    scores = [Score.of_all(f"`sun` {at}: the whole picture right", fits[at]) for at in made]
    scores += [
        Score.of_all(f"`{size or 'no size'}`: a radius between medium and large", [LOW < r < HIGH for r in radii[size]])
        for size in SIZE_WORDS
    ]
    rows = [
        Row("; ".join(request.prompt or "" for request in asked[start : start + 2]),
            [Tile(f"{at}", made[at][i], fits[at][i]) for i in range(start, min(start + 2, len(suns))) for at in made])
        for start in range(0, min(2 * SHOWN, len(suns)), 2)
    ]  # fmt: skip
    rows += [Row("", [Tile(sized[size][i].prompt or "", images[size][i]) for size in SIZE_WORDS]) for i in range(2)]
    means = ", ".join(f"{np.mean(radii[size]):.1f} ({size or 'no size'})" for size in SIZE_WORDS)
    text = (
        f"`{SUN}` and `{BIG}` are one vector each (0.6 kB), learned from pictures with everything else frozen. The one "
        "makes `sun` a yellow circle, here beside other objects; without it the tokenizer spells the word. The other "
        "one makes `big` a size between medium, which has no word, and large. Mean radius in pixels: "
        f"{means}; radii of training end at 15 for medium and begin at 20 for large."
    )
    said = f"engine.set_embeddings([{SUN!r}, {BIG!r}])\n{call(asked[0])}"
    return Exhibit("Textual inversion", text, said, rows, scores)


def _circle_and_other(seed: int) -> Scene:
    """Two objects of different colors, one of them a circle at least."""
    rng = random.Random(seed)
    while True:
        scene = sample_pair(rng)
        a, b = scene.items
        if a.color != b.color and "circle" in (a.shape, b.shape):
            return scene


def _sun_and_other(seed: int) -> Scene:
    """Two objects, exactly one of them a yellow circle."""
    rng = random.Random(seed)
    scene = sample_pair(rng)
    while [(item.color, item.shape) for item in scene.items].count(("yellow", "circle")) != 1:
        scene = sample_pair(rng)
    return scene


def _one_of_size(seed: int, size: str) -> Request:
    """The same object for every size."""
    rng = random.Random(seed)
    noun = f"{size} {rng.choice(OBJECT_COLORS)} {rng.choice(SHAPES)}".strip()
    return Request(prompt=f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}", seed=seed)


def _radius(image: np.ndarray) -> float:
    """Of the only object, as scenes have it; 0 where there is none or several."""
    seen = look(image)[1]
    return seen[0].width / (1.72 if seen[0].shape == "square" else 2.0) if len(seen) == 1 else 0.0


def _is_turned(angle: float | None) -> bool:
    return angle is not None and TURN / 2 < angle < 1.5 * TURN
