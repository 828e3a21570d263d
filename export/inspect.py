"""What is in an artefact: layers, types, sizes and operators of every graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..engine.artifact import Graph, Manifest, inside
from ..engine.errors import CheckpointError
from .onnx import require_packages


@dataclass(frozen=True)
class Contents:
    """One graph. bytes: of its weights by element type; ops: nodes by operator; external: files the weights are in."""

    name: str
    graph: Graph
    nodes: int
    tensors: int
    bytes: Mapping[str, int]
    ops: Mapping[str, int]
    external: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        ports = {"inputs": self.graph.inputs, "outputs": self.graph.outputs}
        return {
            "graph": self.name, "dtype": self.graph.dtype, "nodes": self.nodes, "tensors": self.tensors,
            "bytes": dict(self.bytes), "ops": dict(self.ops), "files": list(self.external),
            **{key: {p.name: [p.dtype, *p.shape] for p in value} for key, value in ports.items()},
            "options": dict(self.graph.options), "tolerance": self.graph.tolerance,
        }  # fmt: skip


def inspect(folder: Path) -> list[Contents]:
    """Read the graphs of an artefact. Raises CheckpointError for damage, and for weights outside their folder."""
    require_packages("onnx")
    manifest = Manifest.load(folder)
    if manifest.kind != "onnx":
        raise CheckpointError(f"{folder} holds {manifest.kind} graphs, which this version cannot look into")
    return [_read(folder, name, graph) for name, graph in manifest.graphs.items()]


def _read(folder: Path, name: str, graph: Graph) -> Contents:
    import onnx

    path = inside(folder, graph.file)
    if not path.is_file():
        raise CheckpointError(f"{graph.file} of the artefact {folder} is missing: copy the whole folder again")
    model = onnx.load(str(path), load_external_data=False)
    sizes: Counter[str] = Counter()
    files: set[str] = set()
    for tensor in model.graph.initializer:
        kind = onnx.TensorProto.DataType.Name(tensor.data_type).lower()
        sizes[kind] += onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize * _count(tensor.dims)
        for entry in tensor.external_data:
            if entry.key == "location":
                inside(path.parent, entry.value)
                files.add(entry.value)
    ops = Counter(f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in model.graph.node)
    return Contents(
        name,
        graph,
        len(model.graph.node),
        len(model.graph.initializer),
        sizes,
        dict(ops.most_common()),
        tuple(sorted(files)),
    )


def _count(dims: Any) -> int:
    total = 1
    for size in dims:
        total *= size
    return total
