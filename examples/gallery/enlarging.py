"""Features of the gallery that make larger pictures than the built-in model was trained for."""

from __future__ import annotations

import numpy as np

from stepfuse import Engine, Request
from stepfuse.engine.cascade import Cascade, Stage

from ..shapes.scenes import SIZE, caption
from .exhibit import SHOWN, Exhibit, Score, call, paint, right
from .strip import Row, Tile
from .subjects import any_scene

STRENGTHS = (0.1, 0.2, 0.5)


def plain_upscaling(engine: Engine, n: int | None) -> Exhibit:
    """Lanczos behind the model."""
    scenes = [any_scene(seed) for seed in range(n or 20)]
    requests = [Request(prompt=caption(s), seed=seed, upscale="lanczos:4") for seed, s in enumerate(scenes)]
    images = paint(engine, requests)
    fits = right(images, scenes)
    tiles = [Tile(caption(s), image, fit) for s, image, fit in zip(scenes, images, fits, strict=True)]
    text = "256 x 256 pixels of the model's 64 x 64, without another network. Feed-forward networks go the same way."
    return Exhibit(
        "Plain upscaling", text, call(requests[0]), [Row("", tiles[:SHOWN])],
        [Score.of_all("right at 256 x 256", fits)], side=256,
    )  # fmt: skip


def hires_fix(engine: Engine, n: int | None) -> Exhibit:
    """The model once more on its own enlarged picture."""
    scenes = [any_scene(seed) for seed in range(n or 12)]
    requests = [Request(prompt=caption(scene), seed=seed) for seed, scene in enumerate(scenes)]
    images = {0.0: paint(engine, requests, upscale="lanczos:2")}
    for strength in STRENGTHS:
        again = Stage(scale=2, request={"strength": strength})
        images[strength] = paint(engine, requests, cascade=Cascade(name="hires", stages=(Stage(), again)))
    fits = {strength: right(list(map(_reduced, made)), scenes) for strength, made in images.items()}
    rows = [
        Row(
            caption(scene),
            [
                Tile(f"strength {strength:g}" if strength else "lanczos:2 only", made[i], fits[strength][i])
                for strength, made in images.items()
            ],
        )
        for i, scene in enumerate(scenes[:SHOWN])
    ]
    scores = [
        Score.of_all("right, reduced to 64 x 64", f, f"strength {s:g}" if s else "enlarged only")
        for s, f in fits.items()
    ]
    text = (
        "The cascade `hires-fix` enlarges twice and paints again at strength 0.5; other strengths are cascades of "
        "two lines. `shapes` was trained at 64 x 64 only: at 128 x 128 it repeats objects, the more so the more it "
        "may paint. The judge overlooks spots inside objects. Models that know larger sizes are what this is for."
    )
    return Exhibit("Hires fix", text, call(requests[0], cascade="hires-fix"), rows, scores)


def shapes_x4(engine: Engine, n: int | None) -> Exhibit:
    """The built-in diffusion upscaler behind the built-in model. Raises what loading it raises."""
    scenes = [any_scene(seed) for seed in range(n or 8)]
    requests = [Request(prompt=caption(scene), seed=seed) for seed, scene in enumerate(scenes)]
    results = engine.generate(requests, output="np", cascade="shapes-x4")
    images = [result.images[0] for result in results]
    plain = paint(engine, requests, upscale="lanczos:4")
    fits, fits_plain = right(images, scenes), right(plain, scenes)
    rows = [
        Row(
            caption(scene),
            [
                Tile("shapes", result.stages[0].images[0]),
                Tile("lanczos:4", smooth),
                Tile("shapes-x4", image, fit),
            ],
        )
        for scene, result, smooth, image, fit in zip(scenes, results, plain, images, fits, strict=True)
    ][: SHOWN - 1]
    scores = [
        Score.of_all("right at 256 x 256", fits, "shapes-x4"),
        Score.of_all("right at 256 x 256", fits_plain, "lanczos:4"),
    ]
    text = "256 x 256 pixels: the second stage is a diffusion model that sees the first one's picture."
    return Exhibit("Cascade", text, call(requests[0], cascade="shapes-x4"), rows, scores, side=256)


def _reduced(image: np.ndarray) -> np.ndarray:
    """Averaged to 64 x 64 pixels."""
    scale = image.shape[0] // SIZE
    return image.reshape(SIZE, scale, SIZE, scale, 3).mean((1, 3))
