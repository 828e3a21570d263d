"""Weights of exported graphs: always safetensors beside the graph, under the names of the checkpoint.

safetensors is a header and raw little-endian data, so that an ONNX external tensor (file, offset, length) can point
straight into it: into a copy in the dtype of the export, or into the user's own file through a hard link.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ..engine.errors import RequestError
from ..engine.weights.checkpoint import TensorInfo

Where = Literal["copy", "link"]
SPELLING = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
COPY = "model.safetensors"


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: a file in the graph's folder, and the bytes of it."""

    file: str
    offset: int
    length: int


def link(tensors: Mapping[str, TensorInfo], dtypes: Mapping[str, str], folder: Path) -> dict[str, Stored]:
    """Hard links of the files the tensors are in, in `folder`; dtypes: those the graph needs, by key.

    Symlinks (the cache of huggingface_hub is made of them) are followed: runtimes refuse symlinked weights. Raises
    RequestError where the stored dtype is another one, or the file system refuses.
    """
    for key, info in tensors.items():
        if info.dtype != SPELLING[dtypes[key]]:
            reason = f"{key} is stored as {info.dtype}, the graph needs {SPELLING[dtypes[key]]}"
            raise RequestError(f"--weights link: {reason}: use copy, or export in the dtype of the checkpoint")
    places: dict[str, Stored] = {}
    for file in sorted({info.file for info in tensors.values()}):
        target = folder / file.name
        target.unlink(missing_ok=True)
        try:
            os.link(file.resolve(), target)
        except OSError as error:
            reason = f"{file} cannot be linked into {folder} ({error.strerror})"
            raise RequestError(f"--weights link: {reason}: use copy") from error
        places |= {key: place for key, place in read_places(target).items() if key in tensors}
    return places


def copy(values: Iterable[tuple[str, torch.Tensor]], folder: Path) -> dict[str, Stored]:
    """Write the tensors, one by one, to a safetensors file in `folder`."""
    listed = list(values)
    header: dict[str, Any] = {}
    start = 0
    for key, value in listed:
        size = value.numel() * value.element_size()
        name = SPELLING[str(value.dtype).removeprefix("torch.")]
        header[key] = {"dtype": name, "shape": list(value.shape), "data_offsets": [start, start + size]}
        start += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    target = folder / COPY
    target.unlink(missing_ok=True)  # never write through a hard link into somebody's checkpoint
    with target.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for _, value in listed:
            stream.write(value.detach().contiguous().flatten().view(torch.uint8).numpy().data)
    return read_places(target)


def read_places(file: Path) -> dict[str, Stored]:
    """Where every tensor of a safetensors file lies in it."""
    with file.open("rb") as stream:
        length = struct.unpack("<Q", stream.read(8))[0]
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    spans = {key: entry["data_offsets"] for key, entry in header.items()}
    return {key: Stored(file.name, 8 + length + start, stop - start) for key, (start, stop) in spans.items()}
