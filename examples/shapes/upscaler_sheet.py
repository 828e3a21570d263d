"""The comparison picture of the upscaler's report: one object's outline, method by method, enlarged by repetition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw

from .scenes import SIZE, Scene
from .upscaler_scenes import SCALE

WHOLE, CROP = 192, 64  # pixels: side of a tile of the sheet, and of the crop it shows
HEADER, GAP = 16, 4


def chosen(scenes: Sequence[Scene]) -> list[int]:
    """Six scenes: the first triangle, circle and square that stand alone, and the first three pairs."""
    singles = [next(i for i, s in enumerate(scenes) if s.relation is None and s.items[0].shape == shape)
               for shape in ("triangle", "circle", "square")]  # fmt: skip
    return singles + [i for i, s in enumerate(scenes) if s.relation][:3]


def corner_of(scene: Scene) -> tuple[int, int]:
    """Left and top of the crop: about the upper end of the first object, where triangles are hardest."""
    item, room = scene.items[0], SCALE * SIZE - CROP
    left, top = SCALE * item.x - CROP / 2, SCALE * (item.y - item.r) - CROP / 4
    return min(max(round(left), 0), room), min(max(round(top), 0), room)


def sheet(scenes: Sequence[Scene], columns: Mapping[str, np.ndarray]) -> Image.Image:
    """Six scenes: the last column but one whole, then a crop of every column. Images [B, 256, 256, 3] in 0..1."""
    rows = chosen(scenes)
    width, height = (len(columns) + 1) * (WHOLE + GAP), HEADER + len(rows) * (WHOLE + GAP)
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    whole = list(columns)[-2]
    for number, name in enumerate((f"{whole}, whole", *columns)):
        draw.text((number * (WHOLE + GAP) + 4, 2), name, fill="black")
    for row, index in enumerate(rows):
        top = HEADER + row * (WHOLE + GAP)
        canvas.paste(_picture(columns[whole][index]).resize((WHOLE, WHOLE), Image.Resampling.BOX), (0, top))
        x, y = corner_of(scenes[index])
        for number, images in enumerate(columns.values(), start=1):
            crop = _picture(images[index][y : y + CROP, x : x + CROP])
            canvas.paste(crop.resize((WHOLE, WHOLE), Image.Resampling.NEAREST), (number * (WHOLE + GAP), top))
    return canvas


def _picture(image: np.ndarray) -> Image.Image:
    return Image.fromarray(np.round(image * 255).clip(0, 255).astype(np.uint8))
