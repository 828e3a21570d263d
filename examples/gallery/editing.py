"""Features of the gallery that start from a picture. The pictures are drawn by `examples/shapes/render.py`."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from stepfuse import Engine, Request
from stepfuse.engine.conditioning.images import expand

from ..shapes.inpainting_masks import around
from ..shapes.inpainting_weights import build
from ..shapes.scenes import SIZE, Scene, caption
from .exhibit import SHOWN, Exhibit, Score, call, holds, paint, right
from .strip import Row, Tile
from .subjects import half, half_mask, large_object, one_exchanged, picture, recolored_and_turned, side_by_side

STRENGTHS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.6)
POWERS = (1, 2, 3)
RESAMPLE = (10, 4)
KEPT = 1.0  # pixels that the center of a kept object may move
SEEING = "shapes-inpainting"
MARGIN = 4.0  # pixels between an object and the border of a mask round it


def image_to_image(engine: Engine, n: int | None) -> Exhibit:
    """Other colors, and another relation: strength decides how much of it is done."""
    scenes = [recolored_and_turned(seed) for seed in range(n or 30)]
    requests = {
        strength: [
            Request(prompt=caption(wanted), image=picture(given), strength=strength, seed=seed)
            for seed, (given, _, wanted) in enumerate(scenes)
        ]
        for strength in STRENGTHS
    }
    images = {strength: paint(engine, asked) for strength, asked in requests.items()}
    there = {strength: right(made, [s[1] for s in scenes]) for strength, made in images.items()}
    fits = {strength: right(made, [s[2] for s in scenes]) for strength, made in images.items()}
    rows = [
        Row(
            caption(wanted),
            [Tile("given", picture(given))]
            + [Tile(f"strength {strength:g}", images[strength][i], fits[strength][i]) for strength in STRENGTHS],
        )
        for i, (given, _, wanted) in enumerate(scenes[:SHOWN])
    ]
    scores = [
        Score.of_all(what, found[strength], f"strength {strength:g}")
        for strength in STRENGTHS
        for what, found in (("prompt's colors at the picture's places", there), ("all of the prompt", fits))
    ]
    text = (
        "SDEdit: the last part of the schedule, from the noised picture. The prompt asks for other colors and for "
        "another relation. Low strengths change colors where the picture has objects, and mix the two where the "
        "prompt's places cut through one; objects move from 0.4 on."
    )
    return Exhibit("Image to image", text, call(requests[STRENGTHS[-1]][0]), rows, scores, side=112)


def inpainting(engine: Engine, n: int | None) -> Exhibit:
    """One object of a pair exchanged under a mask."""
    scenes = [one_exchanged(seed) for seed in range(n or 50)]
    requests = [
        Request(prompt=caption(wanted), image=picture(given), mask=half_mask(wanted.items[1].place), seed=seed)
        for seed, (given, wanted) in enumerate(scenes)
    ]
    images = paint(engine, requests)
    fits = right(images, [wanted for _, wanted in scenes])
    scores = [
        Score.of_all("right: the whole picture as the prompt says", fits),
        Score.of_all(
            "new object: its color and shape in the masked half (within 4 pixels of the old one)",
            [holds(image, wanted.items[1], 4.0) for image, (_, wanted) in zip(images, scenes, strict=True)],
        ),
        Score.of_all(
            f"kept object: same color and shape, center within {KEPT:g} pixel",
            [holds(image, given.items[0], KEPT) for image, (given, _) in zip(images, scenes, strict=True)],
        ),
    ]
    rows = _rows_of_three(requests, [picture(given) for given, _ in scenes], images, fits)
    text = (
        "The white half is painted anew from noise; the other half is put back after every update. What is kept goes "
        "through the autoencoder, which rounds tips: the judge may refuse a kept triangle for it."
    )
    return Exhibit("Inpainting", text, call(requests[0]), rows, scores)


def inpainting_model(engine: Engine, n: int | None) -> Exhibit:
    """The same exchanges by a model that sees the mask and by putting back, under half a picture or a small square."""
    if SEEING not in engine.models:
        with TemporaryDirectory() as folder:
            engine.add(SEEING, build(Path(folder) / SEEING))
    scenes = [one_exchanged(seed) for seed in range(n or 50)]
    tiles = [[Tile("given", picture(given))] for given, _ in scenes[:SHOWN]]
    scores, beyond, requests = [], [], []
    for kind in ("half", "square"):
        for how, model in (("put back", None), ("sees the mask", SEEING)):
            requests = [
                Request(prompt=caption(wanted), image=picture(given), mask=_mask(kind, given), seed=seed, model=model)
                for seed, (given, wanted) in enumerate(scenes)
            ]
            images, at = paint(engine, requests), f"{kind}, {how}"
            fits = right(images, [wanted for _, wanted in scenes])
            pairs = list(zip(images, scenes, strict=True))
            scores += [
                Score.of_all("right: the whole picture", fits, at),
                Score.of_all("new object (within 4 pixels)", [holds(i, s[1].items[1], 4.0) for i, s in pairs], at),
                Score.of_all("kept object (1 pixel)", [holds(i, s[0].items[0], KEPT) for i, s in pairs], at),
            ]
            beyond.append(f"{255 * float(np.mean(list(map(_moved, images, requests)))):.1f} ({at})")
            for row, request, image, fit in zip(tiles, requests, images, fits, strict=False):
                row += [Tile("mask", request.mask)] * (model is None) + [Tile(how, image, fit)]
    rows = [Row(caption(wanted), shown) for (_, wanted), shown in zip(scenes, tiles, strict=False)]
    text = (
        "A model with 17 input channels (latents, mask, latents of what the mask leaves; 9 where latents have 4), made "
        f"of `shapes` by a LoRA and a new entry: `engine.add({SEEING!r}, build(folder))` with `build` of "
        "examples/shapes/inpainting_weights.py. Scenes, prompts and seeds are those of inpainting above, where the "
        "model does not know the mask and the rest is put back after every update. The square round the old object "
        f"goes {MARGIN:g} pixels beyond its circle. A model that sees the mask paints the rest, too, so what is kept "
        f"is less exact. Mean difference from the given picture outside the mask, of 255: {', '.join(beyond)}."
    )
    return Exhibit("Inpainting model", text, call(requests[0]), rows, scores, side=112)


def change_map(engine: Engine, n: int | None) -> Exhibit:
    """Strength from 0 at the left to 1 at the right."""
    scenes = [side_by_side(seed) for seed in range(n or 25)]
    across = np.linspace(0, 1, SIZE, dtype=np.float32)[None].repeat(SIZE, 0)
    requests = {
        power: [
            Request(prompt=caption(wanted), image=picture(given), change_map=across**power, seed=seed)
            for seed, (given, wanted) in enumerate(scenes)
        ]
        for power in POWERS
    }
    images = {power: paint(engine, asked) for power, asked in requests.items()}
    rows = []
    for i, (given, wanted) in enumerate(scenes[:SHOWN]):
        tiles = [Tile("given", picture(given))]
        for power in POWERS:
            tiles += [Tile(_name(power), across**power), Tile("painted with it", images[power][i])]
        rows.append(Row(caption(wanted), tiles))
    scores = []
    for power in POWERS:
        pairs = list(zip(images[power], scenes, strict=True))
        old = [holds(image, given.items[0], KEPT) for image, (given, _) in pairs]
        new = [holds(image, wanted.items[1], 4.0) for image, (_, wanted) in pairs]
        scores += [
            Score.of_all(f"left object as given, center within {KEPT:g} pixel", old, _name(power)),
            Score.of_all("right object as the prompt says", new, _name(power)),
        ]
    text = (
        "Differential Diffusion: brightness is the strength of each pixel, here a power of the way x from the left "
        "border (0) to the right one (1). The prompt asks for two other colors. A strength of 0.1 already changes "
        "colors (image to image, above), so only maps that stay dark for long keep the left object."
    )
    return Exhibit("Change maps", text, call(requests[POWERS[-1]][0]), rows, scores, side=112)


def outpainting(engine: Engine, n: int | None) -> Exhibit:
    """One half of a picture; the other one is painted."""
    scenes = [one_exchanged(seed)[0] for seed in range(n or 50)]
    requests = []
    for seed, scene in enumerate(scenes):
        first, second = scene.items
        grown, mask = expand(picture(scene)[half(first.place)], **{second.place: SIZE // 2})
        requests.append(Request(prompt=caption(scene), image=grown, mask=mask, seed=seed))
    images = paint(engine, requests)
    fits = right(images, scenes)
    scores = [
        Score.of_all("right: the whole picture as the prompt says", fits),
        Score.of_all(
            f"given object: same color and shape, center within {KEPT:g} pixel",
            [holds(image, scene.items[0], KEPT) for image, scene in zip(images, scenes, strict=True)],
        ),
    ]
    rows = _rows_of_three(requests, list(map(_first_half, scenes)), images, fits)
    text = (
        "A picture of 64 x 32 or 32 x 64 pixels with one object; 32 pixels are added where the second one belongs. "
        "`expand` makes room and mask: `image, mask = expand(picture, right=32)`. 8 given pixels beside the room are "
        "painted anew, too, and objects reach into them."
    )
    return Exhibit("Outpainting", text, call(requests[0]), rows, scores)


def repaint(engine: Engine, n: int | None) -> Exhibit:
    """Half an object completed without a prompt, with and without resampling."""
    scenes = [large_object(seed) for seed in range(n or 40)]
    plain = [
        Request(prompt="", guidance_scale=1.0, image=picture(scene), mask=half_mask("right"), seed=seed)
        for seed, scene in enumerate(scenes)
    ]
    again = [
        Request(prompt="", guidance_scale=1.0, image=asked.image, mask=asked.mask, resample=RESAMPLE, seed=asked.seed)
        for asked in plain
    ]
    once, often = paint(engine, plain), paint(engine, again)
    fits = right(once, scenes), right(often, scenes)
    rows = []
    for start in range(0, min(len(scenes), 2 * SHOWN), 2):
        tiles = []
        for i in range(start, min(start + 2, len(scenes))):
            tiles += [
                Tile("given, half of it", np.where(plain[i].mask[..., None] > 0, 0.6, plain[i].image)),
                Tile("put back only", once[i], fits[0][i]),
                Tile(f"resample={RESAMPLE}", often[i], fits[1][i]),
            ]
        rows.append(Row("", tiles))
    scores = [
        Score.of_all("right", fits[0], "put back only"),
        Score.of_all("right", fits[1], f"resample={RESAMPLE}"),
    ]
    text = (
        "The right half of a large object is missing, and the prompt is empty: only the known half says what belongs "
        "there. RePaint goes back up the schedule again and again, so that both halves come to agree."
    )
    return Exhibit("RePaint", text, call(again[0]), rows, scores, side=112)


def _mask(kind: str, given: Scene) -> np.ndarray:
    """The half with the second object, or a square round it."""
    item = given.items[1]
    return half_mask(item.place) if kind == "half" else around(item, MARGIN).astype(np.float32)


def _moved(image: np.ndarray, request: Request) -> float:
    """Mean absolute difference from the given picture outside the mask."""
    return float(np.abs(image - request.image)[request.mask < 0.5].mean())


def _name(power: int) -> str:
    return "map x" if power == 1 else f"map x^{power}"


def _first_half(scene: Scene) -> np.ndarray:
    """The half with the first object, on gray."""
    shown: np.ndarray = np.full((SIZE, SIZE, 3), 0.6, np.float32)
    where = half(scene.items[0].place)
    shown[where] = picture(scene)[where]
    return shown


def _rows_of_three(
    requests: list[Request], given: list[np.ndarray], images: list[np.ndarray], fits: list[bool]
) -> list[Row]:
    """Given, mask and result of the first requests, two requests in a row."""
    rows = []
    for start in range(0, min(len(requests), 2 * SHOWN), 2):
        tiles, prompts = [], []
        for request, known, image, fit in list(zip(requests, given, images, fits, strict=True))[start : start + 2]:
            tiles += [Tile("given", known), Tile("mask", request.mask), Tile("painted", image, fit)]
            prompts.append(request.prompt or "")
        rows.append(Row("; ".join(prompts), tiles))
    return rows
