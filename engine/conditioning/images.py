"""Pictures and masks that users give: checked before they are decoded, and brought to one form."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import RequestError

FORMATS = ("PNG", "JPEG", "WEBP")
MOST_PIXELS = 4096 * 4096
"""Refused above, before decoding: a file of 21 KB can hold 13000 x 13000 pixels."""
TOO_LARGE = f"at most {MOST_PIXELS} (4096 x 4096) pixels are read: shrink it"
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")
"""How an address begins; a drive of Windows has one letter."""


def load_image(source: Any, name: str = "image") -> NDArray[np.float32]:
    """float32 [H, W, 3] in 0..1 from a path, the bytes of a file, a PIL image or an array.

    Arrays are uint8 in 0..255 or float in 0..1, [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]. Pictures are turned as their
    EXIF data says; grey becomes three equal channels; what is transparent shows white. Colour profiles are ignored.
    name: of the field, for messages. Raises RequestError for everything else.
    """
    return _on_white(_channels(source, name))


def load_mask(source: Any, name: str = "mask") -> NDArray[np.float32]:
    """float32 [H, W] in 0..1, 1 where something is to be painted: the brightness of a picture as of `load_image`.

    A picture that is opaque white and has holes is taken by its holes: transparent is 1.
    """
    pixels = _channels(source, name)
    if pixels.shape[2] == 4 and (pixels[..., 3] < 1).any():
        return 1 - pixels[..., 3]
    return _on_white(pixels) @ np.array([0.299, 0.587, 0.114], np.float32)


def resize(image: NDArray[np.float32], width: int, height: int, by: str = "lanczos") -> NDArray[np.float32]:
    """A picture [H, W, C] or a mask [H, W] in another size; 0..1 is kept.

    by: "lanczos" (Lanczos-3), "bicubic", "bilinear" or "nearest", as Pillow does them.
    """
    if image.shape[:2] == (height, width):
        return image
    kernel = Image.Resampling[by.upper()]
    planes = [image] if image.ndim == 2 else list(np.moveaxis(image, -1, 0))
    made = [np.asarray(Image.fromarray(plane).resize((width, height), kernel)) for plane in planes]
    return (made[0] if image.ndim == 2 else np.stack(made, -1)).clip(0, 1)


def expand(
    image: NDArray[np.float32], left: int = 0, right: int = 0, top: int = 0, bottom: int = 0, *, overlap: int = 8
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """A picture [H, W, 3] with room at its sides in pixels, and the mask [H', W'] that paints it: outpainting.

    The room repeats the edges: the autoencoder sees a few pixels across the border, and noise there would change its
    latents of the picture more. overlap: pixels of the picture that are painted anew beside the room, so that the seam
    is made of both; 7 or more cover latent sites of 8 pixels that the border cuts. Raises RequestError for negative
    numbers, no room at all, or an overlap that leaves nothing of the picture.
    """
    sides = {"left": left, "right": right, "top": top, "bottom": bottom}
    for name, pixels in (*sides.items(), ("overlap", overlap)):
        if isinstance(pixels, bool) or not isinstance(pixels, int) or pixels < 0:
            raise RequestError(f"{name}: got {pixels!r}, expected a whole number of pixels >= 0")
    if not any(sides.values()):
        raise RequestError("expand: no room at any side; give left, right, top or bottom")
    height, width = image.shape[:2]
    _check_size(width + left + right, height + top + bottom, "the expanded image")
    mask: NDArray[np.float32] = np.ones((height + top + bottom, width + left + right), np.float32)
    kept = [slice(before + overlap * (before > 0), before + side - overlap * (after > 0))
            for before, side, after in ((top, height, bottom), (left, width, right))]  # fmt: skip
    mask[kept[0], kept[1]] = 0
    if mask.all():
        raise RequestError(f"overlap: {overlap} pixels leave nothing of a picture of {width} x {height}; use fewer")
    return np.pad(image, ((top, bottom), (left, right), (0, 0)), mode="edge"), mask


def _channels(source: Any, name: str) -> NDArray[np.float32]:
    """float32 [H, W, 3 or 4] in 0..1."""
    if isinstance(source, np.ndarray):
        return _from_array(source, name)
    if isinstance(source, Image.Image):
        return _from_pil(source, name)
    if isinstance(source, (str, Path)):
        path = _file(source, name)
        try:
            stream = path.open("rb")
        except OSError as error:
            raise RequestError(f"{name}: {str(path)!r} cannot be opened ({error.strerror})") from None
        with stream:
            return _decode(stream, name)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _decode(io.BytesIO(source), name)
    expected = "a path, the bytes of a PNG, JPEG or WebP file, a PIL image or a numpy array"
    raise RequestError(f"{name}: got {type(source).__name__}, expected {expected}")


def _file(source: str | Path, name: str) -> Path:
    path, text = Path(source).expanduser(), str(source)
    said = repr(text if len(text) <= 200 else f"{text[:200]}...")
    try:
        if path.is_file():
            return path
        if path.is_dir():
            raise RequestError(f"{name}: {said} is a folder; give one of its files")
    except OSError:  # the name is too long for one
        pass
    if URL.match(text):
        raise RequestError(f"{name}: no file {said}: nothing is downloaded; give the file itself, or its bytes")
    raise RequestError(f"{name}: no file {said}")


def _decode(stream: Any, name: str) -> NDArray[np.float32]:
    try:
        with Image.open(stream, formats=FORMATS) as image:
            return _from_pil(image, name)
    except UnidentifiedImageError:
        raise RequestError(f"{name}: not a PNG, JPEG or WebP file; convert it to one of them") from None
    except Image.DecompressionBombError:  # Pillow's own limit, which is above ours
        raise RequestError(f"{name}: {TOO_LARGE}") from None
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, RequestError):
            raise
        # the decoder's own words may hold addresses of this process
        raise RequestError(f"{name}: the file is damaged or incomplete") from None


def _from_pil(image: Image.Image, name: str) -> NDArray[np.float32]:
    _check_size(image.width, image.height, name)
    if getattr(image, "n_frames", 1) > 1:
        raise RequestError(f"{name}: an animation of {getattr(image, 'n_frames', 1)} frames; give one picture")
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "I;16", "I;16B", "I;16L"):
        grey = np.asarray(image, dtype=np.float32) / 65535
        return np.repeat(grey.clip(0, 1)[..., None], 3, -1)
    if image.mode == "F":  # of no known range: Pillow would cut it to whole numbers up to 255
        raise RequestError(f"{name}: got a PIL image of mode 'F'; give its values as an array of floats in 0..1")
    clear = image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info
    return np.asarray(image.convert("RGBA" if clear else "RGB")).astype(np.float32) / np.float32(255)


def _from_array(array: NDArray[Any], name: str) -> NDArray[np.float32]:
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)) or 0 in array.shape:
        raise RequestError(f"{name}: got an array of shape {array.shape}, expected [H, W] or [H, W, 1, 3 or 4]")
    _check_size(array.shape[1], array.shape[0], name)
    pixels: NDArray[np.float32] = array.astype(np.float32)
    if array.dtype == np.uint8:
        pixels /= 255
    elif array.dtype.kind == "f":
        if not (np.isfinite(pixels).all() and pixels.min() >= 0 and pixels.max() <= 1):
            raise RequestError(f"{name}: a float array must lie in 0..1; got {pixels.min():.3g} to {pixels.max():.3g}")
    elif array.dtype != np.bool_:
        raise RequestError(f"{name}: got an array of {array.dtype}, expected uint8 in 0..255 or float in 0..1")
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    return np.repeat(pixels, 3, -1) if pixels.shape[2] == 1 else pixels


def _check_size(width: int, height: int, name: str) -> None:
    if not width * height:
        raise RequestError(f"{name}: {width} x {height} pixels, so there is no picture")
    if width * height > MOST_PIXELS:
        raise RequestError(f"{name}: {width} x {height} pixels; {TOO_LARGE}")


def _on_white(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    if pixels.shape[2] == 3:
        return pixels
    alpha = pixels[..., 3:]
    return (pixels[..., :3] * alpha + (1 - alpha)).astype(np.float32)
