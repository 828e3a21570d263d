"""The manifest of exported artefacts: what it accepts, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from stepfuse.engine.artifact import MANIFEST, Graph, Manifest, Port, Profile, Range, inside, sha256
from stepfuse.engine.errors import CheckpointError, RequestError

GRAPH = Graph(
    component="unet",
    dtype="float16",
    file="unet/model.onnx",
    inputs=(
        Port("sample", "float16", ("rows", 4, "8*height", "width")),
        Port("labels", "int64", ("rows",)),
    ),
    outputs=(Port("out", "float16", ("2*rows", 4)),),
    axes={"rows": (1, 8), "height": (2, 16), "width": (2, 128)},
    profiles=(Profile("512x512", {"rows": Range(1, 4, 8)}),),
    traced={"rows": 2, "height": 2, "width": 24},
)


@pytest.fixture
def artefact(tmp_path: Path) -> Path:
    (tmp_path / "unet").mkdir()
    (tmp_path / "vae_decoder").mkdir()
    (tmp_path / "unet" / "model.onnx").write_bytes(b"graph")
    (tmp_path / "vae_decoder" / "model.onnx").write_bytes(b"other")
    files = {name: sha256(tmp_path / name) for name in ("unet/model.onnx", "vae_decoder/model.onnx")}
    manifest = Manifest(
        kind="onnx",
        architecture="sd",
        components={"unet": "UNet2DConditionModel"},
        graphs={"unet": GRAPH},
        versions={"torch": "2"},
        files=files,
    )
    manifest.save(tmp_path)
    return tmp_path


def test_a_manifest_survives_the_disk(artefact: Path) -> None:
    found = Manifest.load(artefact)
    assert found.graphs["unet"] == GRAPH
    assert found.graph("unet").profiles[0].axes["rows"].max == 8
    found.check(artefact)


def test_changed_missing_and_linked_files_are_refused(artefact: Path) -> None:
    manifest, file = Manifest.load(artefact), artefact / "unet" / "model.onnx"
    file.write_bytes(b"grapj")
    with pytest.raises(CheckpointError, match=r"unet/model.onnx .* is not the file that was exported"):
        manifest.check(artefact)
    manifest.check(artefact, only=["vae_decoder"])
    file.unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        manifest.check(artefact, only=["unet"])
    (artefact / "real").write_bytes(b"graph")
    os.symlink(artefact / "real", file)
    with pytest.raises(CheckpointError, match="is a symlink: refused"):
        manifest.check(artefact)


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "", "C:/x", "a\\..\\x"])
def test_paths_that_leave_the_folder_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="points outside the artefact"):
        inside(tmp_path, name)


def test_a_symlinked_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    os.symlink(tmp_path / "real", tmp_path / "unet")
    with pytest.raises(CheckpointError, match="symlink"):
        inside(tmp_path, "unet/model.onnx")


@pytest.mark.parametrize("damage", ["{", "[]", '{"schema": 99}', '{"schema": 1}'])
def test_damaged_manifests_are_refused(damage: str, artefact: Path) -> None:
    (artefact / MANIFEST).write_text(damage)
    with pytest.raises(CheckpointError, match="export the model again"):
        Manifest.load(artefact)


def test_a_folder_without_a_manifest_and_a_graph_it_lacks(artefact: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no graph 'unett'; did you mean 'unet'"):
        Manifest.load(artefact).graph("unett")
    with pytest.raises(CheckpointError, match="is no artefact"):
        Manifest.load(tmp_path / "unet")


def test_sizes_are_read_from_shapes() -> None:
    assert GRAPH.measure({"sample": (3, 4, 64, 30), "labels": (3,)}) == {"rows": 3, "height": 8, "width": 30}
    assert GRAPH.outputs[0].sizes({"rows": 3}) == (6, 4)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"sample": (3, 4, 64, 30)}, "input 'labels' is missing"),
        ({"sample": (3, 4, 64, 30), "labels": (2,)}, r"labels: got shape \(2,\), expected \['rows'\] with rows=3"),
        ({"sample": (3, 4, 60, 30), "labels": (3,)}, "sample: got shape"),
        ({"sample": (3, 5, 64, 30), "labels": (3,)}, "sample: got shape"),
        ({"sample": (3, 4, 64), "labels": (3,)}, "sample: got shape"),
        ({"sample": (9, 4, 64, 30), "labels": (9,)}, "rows: got 9, this graph was exported for 1 to 8"),
    ],
)
def test_shapes_a_graph_does_not_take(shapes: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        GRAPH.measure(shapes)


def test_the_file_is_plain_json(artefact: Path) -> None:
    found = json.loads((artefact / MANIFEST).read_text())
    assert found["schema"] == 1
    assert str(artefact) not in json.dumps(found)
    assert replace(Manifest.load(artefact), kind="onnx") == Manifest.load(artefact)


def test_the_manifest_and_the_commands_load_no_torch() -> None:
    code = (
        "import sys, stepfuse.engine.artifact, stepfuse.export.cli\n"
        "print(sorted({'torch', 'onnx', 'onnxruntime', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
