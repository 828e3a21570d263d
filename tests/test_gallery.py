"""The gallery: scores of a small run, files of every feature, and a judge that sees what an edit left."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from stepfuse import Request
from stepfuse.examples.gallery.__main__ import DOCS, FEATURES, make
from stepfuse.examples.gallery.exhibit import Score, call, holds, right
from stepfuse.examples.gallery.report import report
from stepfuse.examples.gallery.strip import GAP, WRONG, Row, Tile, strip
from stepfuse.examples.gallery.subjects import any_scene, half_mask, one_exchanged, picture, recolored_and_turned

PICTURES = DOCS / "images" / "gallery"
MOST_BYTES, MOST_BYTES_IN_ALL = 60_000, 600_000


def test_a_small_run_writes_strips_scores_and_report(tmp_path):
    entries = make(["text_to_image", "inpainting"], tmp_path, prompts=3)
    assert list(entries) == ["text_to_image", "inpainting"]
    (whole,) = entries["text_to_image"]["scores"]
    assert (whole["count"], whole["of"]) == (3, 3), "the model draws its own grammar"
    fits, new, kept = entries["inpainting"]["scores"]
    assert kept["count"] == kept["of"] == 3, "the object outside the mask stays"
    assert new["count"] >= 2, "the object under the mask becomes what the prompt says"
    assert fits["count"] <= min(new["count"], kept["count"])
    page = (tmp_path / "gallery.md").read_text()
    for name in entries:
        assert f"images/gallery/{name}.png" in page
        with Image.open(tmp_path / "images" / "gallery" / f"{name}.png") as image:
            assert image.width > 2 * 128
    assert "3 of 3" in page
    assert "mask=mask" in page
    again = make([], tmp_path)
    assert again == entries, "a feature that is not made again stays in the report"


def test_every_feature_has_a_small_committed_strip():
    sizes = {name: (PICTURES / f"{name}.png").stat().st_size for name in FEATURES}
    assert max(sizes.values()) <= MOST_BYTES, sizes
    assert sum(sizes.values()) <= MOST_BYTES_IN_ALL
    assert {p.stem for p in PICTURES.glob("*.png")} == set(FEATURES), "a strip of no feature"


def test_the_committed_report_is_that_of_its_counts():
    import json

    entries = json.loads((DOCS / "gallery.json").read_text())
    assert list(entries) == list(FEATURES)
    assert (DOCS / "gallery.md").read_text() == report(entries)


@pytest.mark.parametrize("seed", range(8))
def test_an_object_counts_as_kept_only_with_color_shape_and_place(seed: int):
    given, wanted = one_exchanged(seed)
    image = picture(given)
    first, second = given.items
    assert holds(image, first, 1.0)
    assert holds(image, second, 1.0)
    assert not holds(image, wanted.items[1], 4.0), "an object of another color and shape"
    assert not holds(image, replace(first, x=first.x + 2.5), 1.0), "moved by more than a pixel"
    assert not holds(np.roll(image, 3, 1), first, 1.0)
    mask = half_mask(second.place)
    assert mask[int(second.y), int(second.x)] == 1
    assert mask[int(first.y), int(first.x)] == 0
    assert all(a == b or {a, b} == {0, 1} for a, b in zip(mask[::8].ravel(), mask[7::8].ravel(), strict=True))


@pytest.mark.parametrize("seed", range(8))
def test_what_is_asked_for_differs_from_what_is_given(seed: int):
    given, there, wanted = recolored_and_turned(seed)
    images = [picture(scene) for scene in (given, there, wanted)]
    assert right(images, [given, there, wanted]) == [True] * 3
    assert right(images, [there, wanted, given]) == [False] * 3
    assert any_scene(seed) == any_scene(seed)


def test_strips_frame_what_is_wrong_in_red():
    image = np.zeros((64, 64, 3), np.float32)
    made = strip([Row("title", [Tile("right", image, True), Tile("wrong", image, False)])], side=64)
    pixels = np.asarray(made)
    framed = (pixels == WRONG).all(-1)
    assert framed.any()
    assert not framed[:, : GAP + 64].any(), "the right one has a frame"
    assert (pixels[-GAP - 32, GAP : GAP + 64] == 0).all(), "the picture itself"


def test_calls_say_what_was_asked_and_nothing_else():
    mask = half_mask("left")
    request = Request(prompt="a circle", image=mask, mask=mask, seed=0, resample=(10, 4), output="np")
    assert call(request) == "engine.generate('a circle', seed=0, image=image, mask=mask, resample=(10, 4))"
    assert call(Request(prompt="a"), cascade="hires-fix") == "engine.generate('a', cascade='hires-fix')"


def test_scores_count_what_is_true():
    assert Score.of_all("kept", [True, np.True_, False], "there") == Score("kept", 2, 3, "there")
