"""What an exported artefact says about itself: graphs, inputs, profiles, versions and the hash of every file.

An artefact is a folder with one sub-folder per graph and `stepfuse_artifact.json`. Needs no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal, cast

from .errors import CheckpointError, RequestError, closest

SCHEMA = 1
MANIFEST = "stepfuse_artifact.json"

Kind = Literal["onnx", "tensorrt", "aoti"]


@dataclass(frozen=True)
class Range:
    """Smallest, usual and largest size of an axis."""

    min: int
    opt: int
    max: int


@dataclass(frozen=True)
class Profile:
    """Sizes one execution plan is made for, by axis."""

    name: str
    axes: Mapping[str, Range]


@dataclass(frozen=True)
class Port:
    """A named input or output of a graph.

    dtype: "float32", "float16", "bfloat16", "int32", "int64", "bool". shape: sizes, or axes as "rows" or "8*height".
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def sizes(self, axes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape for these axis sizes."""
        return tuple(size if isinstance(size, int) else _times(size) * axes[axis_of(size)] for size in self.shape)


@dataclass(frozen=True, kw_only=True)
class Graph:
    """One network of an artefact.

    component: the part of the checkpoint its weights are from. axes: smallest and largest size of every axis the graph
    takes. traced: the axis sizes it was recorded at. tolerance: relative error allowed to it; None: not verified.
    options: how it was made (opset, op nodes, where the weights are).
    """

    component: str
    dtype: str
    file: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    axes: Mapping[str, tuple[int, int]]
    profiles: tuple[Profile, ...]
    traced: Mapping[str, int]
    tolerance: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def measure(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        """The axis sizes that inputs of these shapes have. Raises RequestError naming the input that does not fit."""
        axes: dict[str, int] = {}
        for port in self.inputs:
            if port.name not in shapes:
                raise RequestError(f"input {port.name!r} is missing; expected {', '.join(p.name for p in self.inputs)}")
            shape = shapes[port.name]
            if len(shape) != len(port.shape):
                raise RequestError(f"{port.name}: got shape {shape}, expected {list(port.shape)}")
            for got, entry in zip(shape, port.shape, strict=True):
                _fit(port, shape, got, entry, axes)
        for name, size in axes.items():
            low, high = self.axes[name]
            if not low <= size <= high:
                raise RequestError(f"{name}: got {size}, this graph was exported for {low} to {high}; export it again")
        return axes


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The whole artefact. components: name -> class, of the checkpoint; files: path -> SHA-256.

    settings: what the checkpoint's model_index.json says beside its components.
    """

    kind: Kind
    architecture: str
    components: Mapping[str, str]
    graphs: Mapping[str, Graph]
    versions: Mapping[str, str]
    files: Mapping[str, str] = field(default_factory=dict[str, str])
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def graph(self, name: str) -> Graph:
        """The graph of that name. Raises CheckpointError if the artefact does not have it."""
        if name not in self.graphs:
            raise CheckpointError(f"the artefact has no graph {name!r}; {closest(name, self.graphs)}: export it, too")
        return self.graphs[name]

    @property
    def beside(self) -> tuple[str, ...]:
        """The files that belong to no graph: tokenizers, the scheduler, the model's defaults."""
        return tuple(name for name in self.files if PurePosixPath(name).parts[0] not in self.graphs)

    def save(self, folder: Path) -> None:
        """Write `stepfuse_artifact.json`."""
        text = json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1, sort_keys=True)
        (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read the manifest of an artefact. Raises CheckpointError if there is none, or of another schema."""
        path = folder / MANIFEST
        if not path.is_file():
            raise CheckpointError(f"{folder} is no artefact: it has no {MANIFEST}; make one with `stepfuse export`")
        try:
            found = cast("dict[str, Any]", json.loads(path.read_text(encoding="utf-8")))
            if found.pop("schema") != SCHEMA:
                raise CheckpointError(f"{path}: written for another version of stepfuse; export the model again")
            graphs = {name: _graph(entry) for name, entry in found.pop("graphs").items()}
            return cls(graphs=graphs, **found)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{path} is damaged ({error}): export the model again") from error

    def check(self, folder: Path, only: Iterable[str] | None = None) -> None:
        """Compare the hash of every file (of those in the folders `only`). Raises CheckpointError for the first that is
        missing, changed, a symlink, or outside the artefact."""
        wanted = None if only is None else set(only)
        for name, digest in self.files.items():
            if wanted is not None and PurePosixPath(name).parts[0] not in wanted:
                continue
            path = inside(folder, name)
            if not path.is_file():
                raise CheckpointError(f"{name} of the artefact {folder} is missing: copy the whole folder again")
            if sha256(path) != digest:
                raise CheckpointError(
                    f"{name} of the artefact {folder} is not the file that was exported: export again"
                )


def inside(folder: Path, name: str) -> Path:
    """folder / name, a path a file may have. Raises CheckpointError if it leaves the folder or is a symlink."""
    pure = PurePosixPath(name)
    if not name or pure.is_absolute() or ".." in pure.parts or "\\" in name or ":" in name:
        raise CheckpointError(f"{name!r} points outside the artefact {folder}: refused")
    path = folder
    for part in pure.parts:
        path = path / part
        if path.is_symlink():
            raise CheckpointError(f"{path} is a symlink: refused; put the file itself there")
    return path


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def axis_of(size: str) -> str:
    """The axis of a symbolic size: "height" of "8*height"."""
    return size.rpartition("*")[2]


def _times(size: str) -> int:
    return int(size.rpartition("*")[0] or 1)


def _fit(port: Port, shape: tuple[int, ...], got: int, entry: int | str, axes: dict[str, int]) -> None:
    if isinstance(entry, int):
        if got != entry:
            raise RequestError(f"{port.name}: got shape {shape}, expected {list(port.shape)}")
        return
    axis, times = axis_of(entry), _times(entry)
    if got % times or axes.setdefault(axis, got // times) != got // times:
        known = ", ".join(f"{name}={size}" for name, size in axes.items())
        raise RequestError(f"{port.name}: got shape {shape}, expected {list(port.shape)} with {known}")


def _graph(entry: dict[str, Any]) -> Graph:
    ports = {
        key: tuple(Port(p["name"], p["dtype"], tuple(p["shape"])) for p in entry.pop(key))
        for key in ("inputs", "outputs")
    }
    profiles = tuple(
        Profile(p["name"], {axis: Range(**sizes) for axis, sizes in p["axes"].items()}) for p in entry.pop("profiles")
    )
    axes = {name: (low, high) for name, (low, high) in entry.pop("axes").items()}
    return Graph(**ports, profiles=profiles, axes=axes, **entry)
