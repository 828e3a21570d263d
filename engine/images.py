"""Pixels and PNG files. Imports neither torch nor the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo


def to_uint8(images: np.ndarray) -> np.ndarray:
    """uint8 of the same shape from float images in 0..1, rounded to nearest."""
    return (images * 255).round().astype(np.uint8)


def to_pil(pixels: np.ndarray) -> Image.Image:
    """A PIL image from uint8 [H, W, 3] or [H, W, 1]."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def save_png(image: Any, path: Path, parameters: str | None) -> None:
    """Write a PIL image or a float array [H, W, C] in 0..1 as PNG; `parameters` becomes a text chunk of that name."""
    if isinstance(image, np.ndarray):
        image = to_pil(to_uint8(image))
    info = PngInfo()
    if parameters is not None:
        info.add_text("parameters", parameters)
    image.save(path, format="PNG", pnginfo=info)
