"""Pictures and masks that users give: every form becomes the same array, and everything else is a clear error."""

import io
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from stepfuse.engine.conditioning import images
from stepfuse.engine.conditioning.images import load_image, load_mask, resize
from stepfuse.engine.errors import RequestError

HEADER = b"IHDR" + b"\0\0\0\x02" * 2 + b"\x01\0\0\0\0"  # 2 x 2 pixels of one bit
LARGE = b"IHDR" + (50_000).to_bytes(4, "big") * 2 + HEADER[12:]
HUGE = tuple(header + zlib.crc32(header).to_bytes(4, "big") for header in (HEADER, LARGE))
"""What to replace in a file of 2 x 2 pixels, and by what, so that it says 50000 x 50000."""
PIXELS = np.random.default_rng(0).integers(0, 256, (6, 4, 3), dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.parametrize("form", ["path", "text", "bytes", "pil", "uint8", "float"])
def test_every_form_is_the_same_picture(form: str, tmp_path: Path):
    picture = Image.fromarray(PIXELS)
    path = tmp_path / "a.png"
    picture.save(path)
    given = {
        "path": path,
        "text": str(path),
        "bytes": path.read_bytes(),
        "pil": picture,
        "uint8": PIXELS,
        "float": PIXELS.astype(np.float64) / 255,
    }[form]
    found = load_image(given)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, PIXELS / 255.0, atol=1e-6)


def test_jpeg_and_webp_are_read():
    for kind in ("JPEG", "WEBP"):
        found = load_image(encoded(Image.new("RGB", (8, 8), (200, 100, 50)), kind, quality=95))
        np.testing.assert_allclose(found[4, 4], np.array([200, 100, 50]) / 255, atol=0.03)


def test_a_picture_is_turned_as_exif_says():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter to the right when shown
    found = load_image(encoded(Image.fromarray(PIXELS), "PNG", exif=exif))
    np.testing.assert_allclose(found, np.rot90(PIXELS, -1) / 255.0, atol=1e-6)


def test_the_colours_of_print_are_read():
    flat = Image.new("CMYK", (8, 8), (0, 0, 0, 51))
    np.testing.assert_allclose(load_image(encoded(flat, "JPEG", quality=100)), np.full((8, 8, 3), 0.8), atol=0.02)


def test_transparency_shows_white():
    half = np.dstack([PIXELS, np.full((6, 4), 51, np.uint8)])  # alpha 0.2
    expected = PIXELS / 255 * 0.2 + 0.8
    np.testing.assert_allclose(load_image(encoded(Image.fromarray(half))), expected, atol=1e-6)
    np.testing.assert_allclose(load_image(half), expected, atol=1e-6)


def test_palettes_grey_and_sixteen_bits():
    flat = Image.new("P", (3, 2), 1)
    flat.putpalette([0, 0, 0, 255, 128, 0])
    np.testing.assert_allclose(load_image(encoded(flat))[0, 0], np.array([255, 128, 0]) / 255, atol=1e-6)
    clear = encoded(flat, transparency=1)
    np.testing.assert_allclose(load_image(clear), np.ones((2, 3, 3)), atol=1e-6)
    deep = Image.fromarray(np.array([[0, 32768, 65535]], np.uint16))
    np.testing.assert_allclose(load_image(encoded(deep))[0, :, 2], [0, 32768 / 65535, 1], atol=1e-6)
    np.testing.assert_allclose(load_image(np.array([[0.25]])), np.full((1, 1, 3), 0.25))


def test_a_mask_is_brightness_or_holes():
    np.testing.assert_allclose(load_mask(np.array([[0, 255]], np.uint8)), [[0, 1]], atol=1e-6)
    np.testing.assert_allclose(load_mask(np.array([[True, False]])), [[1, 0]])
    holes = np.full((2, 2, 4), 255, np.uint8)
    holes[0, 0, 3] = 0
    np.testing.assert_allclose(load_mask(encoded(Image.fromarray(holes))), [[1, 0], [0, 0]])


def test_resize_is_lanczos_and_stays_in_range():
    rng = np.random.default_rng(1)
    picture = rng.integers(80, 176, (16, 12, 3), dtype=np.uint8)  # 8-bit Pillow also clips between the two passes
    expected = np.asarray(Image.fromarray(picture).resize((30, 40), Image.Resampling.LANCZOS), np.float32) / 255
    found = resize(picture.astype(np.float32) / 255, 30, 40)
    assert found.shape == (40, 30, 3)
    assert np.abs(found - expected).max() <= 1.5 / 255
    edge = resize(np.repeat(np.eye(8, dtype=np.float32), 2, 0)[:8], 20, 20)
    assert edge.shape == (20, 20)
    assert edge.min() >= 0
    assert edge.max() <= 1


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("/no/such/file.png", "no file"),
        (__file__, "not a PNG, JPEG or WebP"),
        (Path(__file__).parent, "is a folder"),
        ("https://example.com/a.png", "nothing is downloaded"),
        (Path("https://example.com/a.png"), "nothing is downloaded"),
        ("iVBORw0KGgo" * 1000, r"no file 'iVBORw0KGgo[^']{0,200}\.\.\.'$"),
        (b"", "not a PNG, JPEG or WebP"),
        (b"GIF89a not really", "not a PNG, JPEG or WebP"),
        (encoded(Image.new("RGB", (4, 4)), "GIF"), "not a PNG, JPEG or WebP"),
        (
            encoded(Image.fromarray(np.random.default_rng(2).integers(0, 256, (64, 64, 3), dtype=np.uint8)))[:400],
            "damaged",
        ),
        (np.zeros((2, 2, 2), np.uint8), "shape"),
        (np.zeros((0, 4), np.uint8), "shape"),
        (np.zeros((2, 2), np.int64), "int64"),
        (np.full((2, 2), 2.0), "0..1"),
        (np.full((2, 2), np.nan), "0..1"),
        (7, "got int"),
        (encoded(Image.new("1", (9000, 9000))), "at most"),
        (encoded(Image.new("1", (2, 2))).replace(*HUGE), r"^image: at most 16777216 .* pixels are read"),
        (Image.new("RGB", (0, 4)), "0 x 4 pixels, so there is no picture"),
        (Image.new("F", (4, 4), 0.5), "floats in 0..1"),
    ],
    ids=["file", "text", "folder", "address", "path of an address", "base64", "nothing", "bytes", "format", "cut",
         "channels", "empty", "dtype", "range", "nan", "type", "bomb", "huge", "no pixels", "float picture"],
)  # fmt: skip
def test_what_cannot_be_read_is_an_error_that_says_so(given: Any, words: str):
    with pytest.raises(RequestError, match=words) as caught:
        load_image(given, "image")
    assert str(caught.value).startswith("image: ")
    assert "0x" not in str(caught.value), "no addresses of this process"


def test_an_animation_is_refused():
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    with pytest.raises(RequestError, match="2 frames"):
        load_image(encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]))


def test_the_pixel_cap_holds_before_decoding(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(images, "MOST_PIXELS", 20)
    with pytest.raises(RequestError, match="shrink"):
        load_image(PIXELS)
