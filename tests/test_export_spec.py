"""Graph specs read from configurations alone: which inputs a component has, and how pixels become latents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from reference.exports import SMALL_REFINER, SMALL_SD, SMALL_SDXL, SMALL_UPSCALER

from stepfuse.engine.artifact import Range
from stepfuse.engine.errors import RequestError
from stepfuse.engine.weights.checkpoint import Checkpoint
from stepfuse.export.spec import GraphSpec, available, make_spec

PUBLISHED = {"addition_time_embed_dim": 256}  # as in SDXL: a pooled prompt of 1280 beside five or six ids
BASE = SMALL_SDXL | PUBLISHED | {"projection_class_embeddings_input_dim": 1280 + 6 * 256}
REFINER = SMALL_REFINER | PUBLISHED | {"projection_class_embeddings_input_dim": 1280 + 5 * 256}


def unet(folder: Path, config: dict[str, Any]) -> GraphSpec:
    """The spec of a U-Net that is a checkpoint of its own."""
    text = json.dumps({"_class_name": "UNet2DConditionModel", **config})
    (folder / "config.json").write_text(text, encoding="utf-8")
    return make_spec(Checkpoint.open(folder), "unet")


def shapes(spec: GraphSpec) -> dict[str, tuple[int | str, ...]]:
    return {port.name: port.shape for port in spec.inputs}


@pytest.mark.parametrize(("config", "ids"), [(BASE, 6), (REFINER, 5)])
def test_size_ids_of_an_sdxl_unet_without_its_text_encoder(config: dict[str, Any], ids: int, tmp_path: Path) -> None:
    found = shapes(unet(tmp_path, config))
    assert found["time_ids"] == ("rows", ids)
    assert found["text_embeds"] == ("rows", 1280)


@pytest.mark.parametrize(
    ("config", "channels", "sites"), [(SMALL_SD | {"in_channels": 9}, 9, 64), (SMALL_UPSCALER, 7, 128)]
)
def test_further_input_channels_and_latents_per_pixel(
    config: dict[str, Any], channels: int, sites: int, tmp_path: Path
) -> None:
    """Inpainting: mask and masked latents. x4 upscaler: the small image, which is as large as the latents."""
    spec = unet(tmp_path, config)
    assert shapes(spec)["sample"] == ("rows", channels, "height", "width")
    assert spec.outputs[0].shape[1] == 4
    assert ("class_labels" in shapes(spec)) == (channels == 7)
    (profile,) = spec.profiles([(512, 512)], [2])
    assert profile.axes["width"] == Range(sites, sites, sites)


def test_networks_that_read_more_than_they_predict_have_no_update_graph(tmp_path: Path) -> None:
    unet(tmp_path, SMALL_SD | {"in_channels": 9})
    with pytest.raises(RequestError, match="reads more channels than it predicts; export 'unet' instead"):
        make_spec(Checkpoint.open(tmp_path), "update")
    assert available(Checkpoint.open(tmp_path)) == ["unet", "update"]


@pytest.mark.parametrize(
    ("given", "rows", "message"),
    [
        ([], [1], "--shapes: unet needs a resolution at least"),
        ([(512, 512)], [], r"--rows: got \[\], expected whole numbers from 1 to 64"),
        ([(512, 500)], [1], "--shapes: unet got height 500, expected a multiple of 8 from 24 to 8192"),
    ],
)
def test_profiles_that_cannot_be(given: list[tuple[int, int]], rows: list[int], message: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=message):
        unet(tmp_path, SMALL_SD).profiles(given, rows)
