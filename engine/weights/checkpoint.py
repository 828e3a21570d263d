"""A checkpoint in the diffusers folder layout, or one component of it: what is there, without reading any weights."""

from __future__ import annotations

import json
import logging
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ..errors import CheckpointError, closest
from .files import PICKLES, choose, listing

logger = logging.getLogger("stepfuse")

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a safetensors file, from its header."""

    file: Path
    dtype: str  # safetensors spelling: F32, F16, BF16, I64 ...
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Checkpoint:
    """Components by name -> class name, as the checkpoint itself says. A single component has the name ''."""

    root: Path
    class_name: str
    components: Mapping[str, str]
    options: Mapping[str, Any]  # the scalars of model_index.json
    variant: str | None = None

    @classmethod
    def open(cls, source: str | Path, *, variant: str | None = None, download: bool = False) -> Checkpoint:
        """Open a folder, or a hub id `org/name` from the local cache of huggingface_hub.

        variant: preferred spelling of the weights ("fp16"); where a component lacks it, what there is is taken with a
        warning. download: fetch a hub id (only the files that will be read). Raises CheckpointError.
        """
        root = _locate(source, variant, download)
        if (root / "model_index.json").is_file():
            index = _read_json(root / "model_index.json")
            components, options = _split_index(index)
            return cls(root, str(index.get("_class_name", "")), components, options, variant)
        if (root / "config.json").is_file():
            name = _class_of(_read_json(root / "config.json"), root)
            return cls(root, name, {"": name}, {}, variant)
        raise CheckpointError(
            f"{root} has neither model_index.json nor config.json: expected a diffusers folder (a pipeline saved with "
            "save_pretrained) or one component of it"
        )

    def folder(self, component: str) -> Path:
        """Folder of a component. Raises CheckpointError if the checkpoint does not have it."""
        if component not in self.components:
            raise CheckpointError(f"{self.root} has no component {component!r}; {closest(component, self.components)}")
        folder = self.root / component
        if not folder.is_dir():
            raise CheckpointError(
                f"model_index.json of {self.root} names {component!r} ({self.components[component]}), "
                "but that folder is missing: fetch the whole checkpoint"
            )
        return folder

    def config(self, component: str) -> dict[str, Any]:
        """The configuration of a component (schedulers and feature extractors have their own file name)."""
        folder = self.folder(component)
        for name in ("config.json", "scheduler_config.json", "preprocessor_config.json"):
            if (folder / name).is_file():
                return {"_class_name": self.components[component], **_read_json(folder / name)}
        raise CheckpointError(f"{folder} has no config.json: the component cannot be built")

    def weights(self, component: str) -> dict[str, TensorInfo]:
        """Every tensor of a component by its key. Reads headers only.

        Raises CheckpointError where files are missing, pickled or contradict their index.
        """
        folder = self.folder(component)
        choice = choose(folder.name or str(folder), listing(folder), self.variant)
        if choice.note:
            logger.warning("%s: %s", folder, choice.note)
        if choice.index is None:
            files: list[str] = list(choice.files)
            expected: dict[str, str] | None = None
        else:
            expected = _weight_map(folder / choice.index)
            files = sorted(set(expected.values()))
        tensors: dict[str, TensorInfo] = {}
        for name in files:
            if not (folder / name).is_file():
                raise CheckpointError(f"shard {name} of {folder} is missing: fetch it again ({choice.index} needs it)")
            for key, info in read_header(folder / name).items():
                if key in tensors:
                    raise CheckpointError(f"{key} is stored twice: in {tensors[key].file.name} and {name} of {folder}")
                tensors[key] = info
        if expected is not None and (lost := sorted(set(expected) - set(tensors))):
            raise CheckpointError(
                f"{choice.index} of {folder} promises {len(lost)} tensors that its shards do not hold, e.g. {lost[0]}"
            )
        return tensors


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Keys, dtypes, shapes of a safetensors file: 8 bytes of length, then JSON. Raises CheckpointError if damaged."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        if start.startswith(b"version "):
            raise CheckpointError(f"{file} is a git-lfs pointer, not the weights: run `git lfs pull`")
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(size - 8, 100_000_000):
            raise CheckpointError(f"{file} is not a safetensors file, or it is cut off: fetch it again")
        try:
            header = cast("dict[str, Any]", json.loads(stream.read(length)))
        except ValueError as error:
            raise CheckpointError(f"{file} has a damaged header ({error}): fetch it again") from error
    header.pop("__metadata__", None)
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if 8 + length + end != size:
        raise CheckpointError(f"{file} has {size} bytes, its header asks for {8 + length + end}: fetch it again")
    return {key: TensorInfo(file, entry["dtype"], tuple(entry["shape"])) for key, entry in header.items()}


def _locate(source: str | Path, variant: str | None, download: bool) -> Path:
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        what = "pickled (it can run code when opened)" if path.suffix in PICKLES else "a single file"
        raise CheckpointError(f"{path} is {what}: give the folder that diffusers' save_pretrained writes")
    if _HUB_ID.fullmatch(str(source)):
        from .hub import snapshot

        return snapshot(str(source), variant, download)
    raise CheckpointError(f"no checkpoint at {source}: expected a diffusers folder or a hub id like org/name")


def _split_index(index: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, Any]]:
    """Components are [library, class]; the library is ignored (it may be a pipeline's module), null means absent."""
    components: dict[str, str] = {}
    options: dict[str, Any] = {}
    for name, value in index.items():
        if name.startswith("_"):
            continue
        if isinstance(value, list):
            pair = cast("list[Any]", value)
            if len(pair) == 2 and pair[1] is not None:
                components[name] = str(pair[1])
        else:
            options[name] = value
    return components, options


def _class_of(config: Mapping[str, Any], root: Path) -> str:
    if "_class_name" in config:
        return str(config["_class_name"])
    architectures = config.get("architectures")  # the spelling of transformers
    if architectures:
        return str(architectures[0])
    raise CheckpointError(f"{root / 'config.json'} does not say its class (_class_name or architectures)")


def _weight_map(file: Path) -> dict[str, str]:
    index = _read_json(file)
    if not isinstance(index.get("weight_map"), dict):
        raise CheckpointError(f"{file} has no weight_map: it is not the index of a sharded checkpoint")
    return cast("dict[str, str]", index["weight_map"])


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON ({error}): fetch it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} holds {type(value).__name__}, expected a JSON object")
    return cast("dict[str, Any]", value)
