"""From a recorded program to an ONNX model whose weights are named, and stored, as in the checkpoint."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import shutil
import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch.export import ExportedProgram

from .. import __version__
from ..engine.artifact import Port
from ..engine.errors import RequestError
from .program import PREFIX
from .spec import MODEL, GraphSpec
from .weights import Stored

if TYPE_CHECKING:
    import onnx_ir as ir

OPSETS = {
    23: "Attention and GroupNormalization are single nodes",
    21: "GroupNormalization is a single node",
    18: "all decomposed",
}
"""Opset -> what it is for: 23 for TensorRT-RTX and TensorRT from 10.15, 21 for older ones, 18 for ONNX Runtime on CUDA,
whose optimiser knows the patterns of that opset."""
FILE = "model.onnx"
INSTALL = "pip install 'stepfuse[onnx]'"
_SYMBOL = re.compile(r"\bs\d+\b")


def require_packages(*names: str) -> None:
    """Raise RequestError with the command that installs what is missing."""
    missing = [name for name in names or ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise RequestError(
            f"this needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed: {INSTALL}"
        )


def check_opset(opset: int) -> None:
    """Raise RequestError for an opset that is not one of OPSETS."""
    if opset not in OPSETS:
        known = ", ".join(f"{number} ({text})" for number, text in OPSETS.items())
        raise RequestError(f"--opset: got {opset}, expected one of {known}")


def convert(program: ExportedProgram, spec: GraphSpec, opset: int, keep: Sequence[str] = ()) -> ir.Model:
    """An ONNX model with the spec's inputs and outputs, free of paths, its parameters still in memory.

    keep: ops that are `stepfuse::` nodes, each with an ONNX function of the same meaning. Raises RequestError for an
    opset this exporter does not write.
    """
    import onnxscript.optimizer

    from . import functions, promote

    check_opset(opset)
    table = dict(promote.TABLE) | functions.translations(keep, opset)
    with torch.no_grad(), _quiet():
        made = torch.onnx.export(
            program,
            (),
            dynamo=True,
            opset_version=opset,
            input_names=[port.name for port in spec.inputs],
            output_names=[port.name for port in spec.outputs],
            custom_translation_table=table,
            optimize=False,
            verbose=False,
        )
    assert made is not None
    model = made.model
    _name_sizes(model, spec)
    # Folding a transposed weight would replace a tensor of the checkpoint by an anonymous one
    parameters = {name for name in model.graph.initializers if name.startswith(PREFIX)}
    onnxscript.optimizer.optimize_ir(
        model,
        should_fold=lambda node: False if any(v is not None and v.name in parameters for v in node.inputs) else None,
    )
    functions.attach(model, keep, opset)
    _clean(model)
    return model


def attach_weights(model: ir.Model, keys: Mapping[str, str], places: Mapping[str, Stored], folder: Path) -> int:
    """Name the parameters as the checkpoint does and point them into its files; returns how many were attached.

    keys: parameter of the network -> key of the checkpoint. Raises AssertionError where a parameter would be lost.
    """
    import onnx_ir as ir

    found = [name for name in model.graph.initializers if name.startswith(PREFIX)]
    for name in found:
        value = model.graph.initializers[name]
        held = value.const_value
        key = keys.get(name.removeprefix(PREFIX))
        if key is None:  # a buffer no checkpoint stores
            value.name = name.removeprefix(PREFIX)
            continue
        place = places[key]
        assert held is not None, f"{key} has no value"
        assert held.nbytes == place.length, f"{key} has another size than its place in {place.file}"
        value.name = key
        value.const_value = ir.ExternalTensor(
            place.file,
            place.offset,
            place.length,
            held.dtype,
            shape=ir.Shape([int(str(n)) for n in held.shape]),
            name=key,
            base_dir=folder,
        )
    return sum(isinstance(value.const_value, ir.ExternalTensor) for value in model.graph.initializers.values())


def save(model: ir.Model, folder: Path) -> Path:
    """Write `model.onnx` and have it checked in full, types and shapes of every node included."""
    import onnx
    import onnx_ir as ir

    path = folder / FILE
    ir.save(model, path)
    # The checker refuses hard links as weights, and reads none of them: empty files of their size stand in.
    with TemporaryDirectory() as scratch:
        shutil.copyfile(path, Path(scratch) / FILE)
        for file in folder.glob("*.safetensors"):
            with (Path(scratch) / file.name).open("wb") as stream:
                stream.truncate(file.stat().st_size)
        onnx.checker.check_model(str(Path(scratch) / FILE), full_check=True)
    return path


def _name_sizes(model: ir.Model, spec: GraphSpec) -> None:
    """Free sizes get the names of their axes, in inputs, outputs and all between."""
    import onnx_ir as ir

    names: dict[str, str] = {}
    for value, port in zip(model.graph.inputs, spec.inputs, strict=True):
        for size, declared in zip(value.shape or (), port.shape, strict=True):
            symbol = _SYMBOL.search(str(getattr(size, "value", size)))
            if isinstance(declared, str) and symbol:
                names[symbol[0]] = declared.rpartition("*")[2]
    for value in [v for node in model.graph for v in node.outputs]:
        if value.shape is not None:
            sizes = [size if isinstance(size, int) else str(size.value) for size in value.shape]
            value.shape = ir.Shape([size if isinstance(size, int) else _rename(size, names) for size in sizes])
    for values, ports in ((model.graph.inputs, spec.inputs), (model.graph.outputs, spec.outputs)):
        for value, port in zip(values, ports, strict=True):
            value.shape = ir.Shape(list(port.shape))


def _rename(size: str, names: Mapping[str, str]) -> str | None:
    """The size in terms of axes; None where it depends on something else."""
    renamed = _SYMBOL.sub(lambda match: names.get(match[0], match[0]), size)
    return None if _SYMBOL.search(renamed) or size == "None" else renamed


def _clean(model: ir.Model) -> None:
    """Remove stack traces and paths of this machine."""
    for graph in (model.graph, *model.functions.values()):
        graph.metadata_props.clear()
        graph.doc_string = None
        for node in graph.all_nodes():
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()
                value.doc_string = None
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
        value.doc_string = None
    model.metadata_props.clear()
    model.doc_string = None
    model.graph.name = "graph"
    model.producer_name, model.producer_version = "stepfuse", __version__


@contextlib.contextmanager
def _quiet() -> Any:
    """The exporter talks to standard output and warns of its own internals."""
    noisy = [logging.getLogger("torch.onnx"), logging.getLogger("onnxscript"), logging.getLogger("onnx_ir")]
    levels = [logger.level for logger in noisy]
    for logger in noisy:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(noisy, levels, strict=True):
            logger.setLevel(level)


def element_type(port: Port, dtype: str) -> str:
    """The dtype of a port in a graph exported in `dtype`."""
    return dtype if port.dtype == MODEL else port.dtype
