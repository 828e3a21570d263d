"""Measures the shipped upscaler through the public API: 200 scenes that it never saw, against the same drawn large.

Low-resolution input are 64x64 renders in 8 bits, truth are 256x256 renders. Beside it, 200 pictures that `shapes`
paints go through both (the cascade). Writes docs/shapes_x4_report.md, docs/shapes_x4_report.json and the comparison
docs/images/shapes_x4.png.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .evaluate import DOCS, paint_with_engine, trials
from .judge import judge
from .render import render, render_window
from .scenes import BACKGROUNDS, SIZE, Scene, load_heldout, pair, sample_single
from .upscaler_scenes import SCALE
from .upscaler_sheet import sheet

SINGLES, PAIRS = 80, 120
FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
MODEL = "shapes-x4"
NOISE_LEVEL = 0
SWEEP = [(steps, NOISE_LEVEL) for steps in (1, 2, 4, 10, 20)] + [(4, level) for level in (5, 20, 50)]
Enlarger = Callable[[np.ndarray], np.ndarray]
"""Images [B, 64, 64, 3] to [B, 256, 256, 3], float32 in 0..1."""


def heldout_scenes(seed: int = 4096) -> list[Scene]:
    """The 200 fixed scenes: 80 single objects, 120 pairs whose combinations training never saw."""
    rng = random.Random(seed)
    scenes = [sample_single(rng) for _ in range(SINGLES)]
    for combination in rng.sample(sorted(load_heldout()), PAIRS):
        colors = {combination[0], combination[3]}
        ground = "white" if rng.random() < 0.3 else rng.choice([b for b in BACKGROUNDS if b not in colors])
        scenes.append(pair(rng, combination, ground))
    return scenes


def small_images(scenes: Sequence[Scene]) -> np.ndarray:
    """Renders [B, 64, 64, 3] float32 in 0..1, rounded to the 8 bits of a picture file."""
    return np.round(render(scenes).transpose(0, 2, 3, 1) * 255).astype(np.float32) / 255


def large_images(scenes: Sequence[Scene]) -> np.ndarray:
    """The truth [B, 256, 256, 3] float32 in 0..1."""
    side = SCALE * SIZE
    return np.stack(
        [render_window(scene, scale=SCALE, left=0, top=0, side=side).transpose(1, 2, 0) for scene in scenes]
    )


def resample(images: np.ndarray, name: str) -> np.ndarray:
    """Enlarged by a filter of Pillow, in float32 and clipped: no rounding on the way."""
    side = SCALE * SIZE

    def channel(plane: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(np.ascontiguousarray(plane)).resize((side, side), FILTERS[name]))

    enlarged = [np.stack([channel(image[..., c]) for c in range(3)], -1) for image in images]
    return np.stack(enlarged).clip(0, 1)


def enlarge_with_engine(images: np.ndarray, *, seed: int = 0, **options: object) -> np.ndarray:
    """Images enlarged by the shipped model; image i has seed + i. options: fields of Request."""
    from stepfuse import Engine, Request

    options = {"noise_level": NOISE_LEVEL, "output": "np"} | options
    with Engine.load(MODEL) as engine:
        requests = [Request(image=image, seed=seed + i, **options) for i, image in enumerate(images)]
        return np.concatenate([result.images for result in engine.generate(requests)])


def psnr(images: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """PSNR in dB of each image [B]."""
    return -10 * np.log10(np.mean((images - truth) ** 2, axis=(1, 2, 3)))


def right(images: np.ndarray, scenes: Sequence[Scene]) -> float:
    """The share that the judge finds right, at the images' own size."""
    return float(np.mean([judge(image, scene).right for image, scene in zip(images, scenes, strict=True)]))


def measure(scenes: Sequence[Scene], enlarged: dict[str, np.ndarray], truth: np.ndarray) -> dict[str, dict[str, float]]:
    """Per method: mean and lowest PSNR, mean of single objects and of pairs, share judged right."""
    pairs = np.array([scene.relation is not None for scene in scenes])
    rows = {}
    for name, images in enlarged.items():
        values = psnr(images, truth)
        rows[name] = {
            "psnr": float(values.mean()),
            "psnr_lowest": float(values.min()),
            "psnr_singles": float(values[~pairs].mean()),
            "psnr_pairs": float(values[pairs].mean()),
            "right": right(images, scenes),
        }
    return rows


def sweep(enlarge: Callable[..., np.ndarray], count: int = 12) -> list[dict[str, float]]:
    """Mean PSNR on other single objects for some numbers of updates and noise levels."""
    rng = random.Random(77)
    scenes = [sample_single(rng) for _ in range(count)]
    small, truth = small_images(scenes), large_images(scenes)
    lanczos = psnr(resample(small, "lanczos"), truth)
    rows = []
    for steps, level in SWEEP:
        values = psnr(enlarge(small, steps=steps, noise_level=level), truth)
        gain = float((values - lanczos).mean())
        rows.append({"steps": steps, "noise_level": level, "psnr": float(values.mean()), "over_lanczos": gain})
    return rows


def cascade(enlarge: Enlarger) -> dict[str, float]:
    """The judge's share on the 200 prompts of evaluate.py: as `shapes` painted them, and enlarged."""
    items = trials()
    painted = paint_with_engine([t.prompt for t in items], [t.seed for t in items])
    scenes = [t.scene for t in items]
    rows = {"shapes": right(painted, scenes), "shapes, lanczos": right(resample(painted, "lanczos"), scenes)}
    return rows | {f"shapes, {MODEL}": right(enlarge(painted), scenes)}


def report(values: dict[str, Any]) -> str:
    """The tables as Markdown."""
    table = values["table"]
    gain = table[MODEL]["psnr"] - table["lanczos"]["psnr"]
    lines = [
        "# How well the built-in upscaler `shapes-x4` enlarges",
        "",
        f"{SINGLES} single objects and {PAIRS} pairs of combinations that training never saw, rendered at 64x64 in",
        "8 bits, enlarged to 256x256 and compared with the same scenes rendered at 256x256. `right`: what",
        "`examples/shapes/judge.py` finds right in the 256x256 pictures, its constants scaled to that size (of the",
        f"truth: {100 * values['truth_right']:.1f} %). `shapes-x4` has its default settings and noise",
        f"level {NOISE_LEVEL} where nothing else is said, float32 on the CPU, seeds 0 to 199.",
        f"It gains {gain:.2f} dB over Lanczos. The judge, made for a generator's mistakes, does not tell them apart.",
        "",
        "| | PSNR, mean | lowest | single objects | pairs | right |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in table.items():
        numbers = " | ".join(f"{row[key]:.2f} dB" for key in ("psnr", "psnr_lowest", "psnr_singles", "psnr_pairs"))
        lines.append(f"| {name} | {numbers} | {100 * row['right']:.1f} % |")
    lines += ["", "Updates and noise level, on 12 other single objects (DDIM):", ""]
    lines += ["| updates | noise level | PSNR | over Lanczos |", "|---|---|---|---|"]
    for row in values["sweep"]:
        numbers = f"{row['psnr']:.2f} dB | {row['over_lanczos']:+.2f} dB"
        lines.append(f"| {row['steps']} | {row['noise_level']} | {numbers} |")
    lines += ["", "The cascade: pictures of the 200 prompts of `shapes_report.md`, judged at their own size.", ""]
    lines += [
        "| | right |",
        "|---|---|",
        *(f"| {name} | {100 * share:.1f} % |" for name, share in values["cascade"].items()),
    ]
    lines += [
        "",
        "Reproduce with `python -m stepfuse.examples.shapes.upscaler_evaluate`; how it was trained is told in",
        "`examples/shapes/README.md`.",
        "",
        "![small picture, Lanczos, shapes-x4, truth](images/shapes_x4.png)",
    ]
    return "\n".join(lines) + "\n"


def evaluate(
    enlarge: Callable[..., np.ndarray] = enlarge_with_engine, docs: Path = DOCS
) -> dict[str, dict[str, float]]:
    """Enlarge, compare, write the three files; returns the table."""
    scenes = heldout_scenes()
    small, truth = small_images(scenes), large_images(scenes)
    enlarged = {name: resample(small, name) for name in FILTERS} | {MODEL: enlarge(small)}
    values = {
        "truth_right": right(truth, scenes),
        "table": measure(scenes, enlarged, truth),
        "sweep": sweep(enlarge),
        "cascade": cascade(enlarge),
    }
    (docs / "images").mkdir(parents=True, exist_ok=True)
    columns = {"64 x 64": enlarged["nearest"], "Lanczos": enlarged["lanczos"], MODEL: enlarged[MODEL], "truth": truth}
    sheet(scenes, columns).save(docs / "images" / "shapes_x4.png", optimize=True)
    (docs / "shapes_x4_report.md").write_text(report(values))
    (docs / "shapes_x4_report.json").write_text(json.dumps(values, indent=1) + "\n")
    return values["table"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--docs", type=Path, default=DOCS, help="where the report goes")
    for name, row in evaluate(docs=parser.parse_args().docs).items():
        print(name, row)


if __name__ == "__main__":
    main()
