"""The feature of the gallery that takes a picture of where things are: a ControlNet."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np

from stepfuse import Control, Engine, Request

from ..shapes.scenes import caption
from ..shapes.silhouettes import overlap, right, sample_free_scene, silhouette
from .exhibit import SHOWN, Exhibit, Score, paint
from .strip import Row, Tile

CONTROLNETS = {"silhouette": "shapes-silhouette"}
FOLLOWS = 0.8  # intersection over union


def controlnet(engine: Engine, n: int | None) -> Exhibit:
    """Objects at places and of sizes that the prompt does not tell, with their silhouette and without."""
    scenes = [sample_free_scene(random.Random(seed)) for seed in range(n or 50)]
    plain = [Request(prompt=caption(scene), seed=seed) for seed, scene in enumerate(scenes)]
    controlled = [
        replace(request, controls=(Control(name="silhouette", image=silhouette(scene)),))
        for request, scene in zip(plain, scenes, strict=True)
    ]
    scores, overlaps, made = [], {}, {}
    for at, requests in (("without", plain), ("with", controlled)):
        made[at] = list(zip(paint(engine, requests), scenes, strict=True))
        found = overlaps[at] = [overlap(*pair) for pair in made[at]]
        scores += [
            Score.of_all("right: background, number, colors, shapes, relation", [right(*p) for p in made[at]], at),
            Score.of_all(f"overlap with the silhouette at least {FOLLOWS:g}", [o >= FOLLOWS for o in found], at),
        ]
    rows = []
    for start in range(0, min(len(scenes), 2 * SHOWN), 2):
        tiles: list[Tile] = []
        for i in range(start, min(start + 2, len(scenes))):
            tiles.append(Tile("control picture", silhouette(scenes[i])))
            tiles += [Tile(f"{at} ControlNet", made[at][i][0], right(*made[at][i])) for at in made]
        rows.append(Row("; ".join(request.prompt or "" for request in plain[start : start + 2]), tiles))
    means = {at: float(np.mean(found)) for at, found in overlaps.items()}
    text = (
        "The engine was loaded with `controlnets={'silhouette': 'shapes-silhouette'}`. The prompt says colors, shapes "
        "and relation; exact places and sizes are in the control picture only, so the place of a single object is not "
        "judged. Overlap is intersection over union of the painted objects and the silhouette: "
        f"{means['without']:.2f} on average without the ControlNet, {means['with']:.2f} with it. What is "
        "wrong with it are small objects, whose corners the autoencoder rounds (examples/shapes/README.md)."
    )
    said = f"engine.generate({plain[0].prompt!r}, seed=0, controls=(Control(name='silhouette', image=image),))"
    return Exhibit("ControlNet", text, said, rows, scores, side=112)
