"""Draws labelled strips: rows of pictures, each row with a title, each picture with a label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

GAP, LINE = 6, 14  # pixels
WRONG, EDGE = (230, 0, 0), (200, 200, 200)


@dataclass(frozen=True)
class Tile:
    """One picture of a strip, [H, W, 3] or [H, W], float in 0..1. right: what the judge said; red frame where not."""

    label: str
    image: np.ndarray
    right: bool | None = None


@dataclass(frozen=True)
class Row:
    """Tiles side by side under a title, as a rule the prompt."""

    title: str
    tiles: Sequence[Tile]


def strip(rows: Sequence[Row], side: int = 128) -> Image.Image:
    """All rows below each other; every picture is shown `side` pixels wide, small ones by repeating their pixels."""
    font = ImageFont.load_default(11)
    blocks = [_row(row, side, font) for row in rows]
    canvas = Image.new("RGB", (max(b.width for b in blocks), sum(b.height for b in blocks)), "white")
    top = 0
    for block in blocks:
        canvas.paste(block, (0, top))
        top += block.height
    return canvas


def _row(row: Row, side: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> Image.Image:
    labels = [_wrapped(tile.label, side, font) for tile in row.tiles]
    title = LINE if row.title else 0
    head = title + LINE * max(map(len, labels))
    block = Image.new("RGB", (len(labels) * (side + GAP) + GAP, head + side + 2 * GAP), "white")
    draw = ImageDraw.Draw(block)
    draw.text((GAP, 0), row.title, fill="black", font=font)
    for number, (tile, lines) in enumerate(zip(row.tiles, labels, strict=True)):
        left = GAP + number * (side + GAP)
        for line, words in enumerate(lines):
            draw.text((left, title + line * LINE), words, fill=(90, 90, 90), font=font)
        if tile.right is False:
            draw.rectangle((left - 3, head + 1, left + side + 2, head + side + 6), fill=WRONG)
        else:
            draw.rectangle((left - 1, head + 3, left + side, head + side + 4), fill=EDGE)
        block.paste(_picture(tile.image, side), (left, head + 4))
    return block


def _wrapped(label: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """The lines of a label that fit the width of its picture."""
    lines: list[str] = []
    for word in label.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _picture(image: np.ndarray, side: int) -> Image.Image:
    pixels = np.round(image * 255).clip(0, 255).astype(np.uint8)
    if pixels.ndim == 2:
        pixels = pixels[..., None].repeat(3, -1)
    by = Image.Resampling.NEAREST if side % image.shape[1] == 0 else Image.Resampling.BOX
    return Image.fromarray(pixels).resize((side, side * image.shape[0] // image.shape[1]), by)
