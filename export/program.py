"""Programs: graphs recorded with torch.export, their ops plain aten, their axes checked to be as free as declared."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import InternalTorchDynamoError, UserError
from torch.export import Dim, ExportedProgram

from ..engine.artifact import Port, axis_of
from ..engine.errors import RequestError
from ..kernels.dispatch import Site
from ..kernels.op import NAMESPACE
from ..kernels.policy import reference_only
from .simplify import simplify
from .spec import MODEL, GraphSpec

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Ordered(nn.Module):
    """The module of a spec, called with its inputs in order."""

    def __init__(self, spec: GraphSpec) -> None:
        super().__init__()
        self.module = spec.module
        self.names = [port.name for port in spec.inputs]

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Inputs as `GraphSpec.inputs` lists them."""
        return self.module(**dict(zip(self.names, tensors, strict=True)))


PREFIX = "module.net."
"""What stands before the names of the network's parameters in a recorded program."""


def trace(spec: GraphSpec, dtype: torch.dtype, keep: Sequence[str] = ()) -> ExportedProgram:
    """Record the graph of a spec whose module is loaded, in `dtype`.

    keep: ops that stay one `stepfuse::` node instead of the aten ops of their reference. Raises RequestError where the
    graph depends on a size that was declared free.
    """
    _bind(spec, keep)
    arguments = tuple(example(spec.inputs, traced(spec), dtype).values())
    noisy = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    before, noisy.disabled = noisy.disabled, True
    try:
        with torch.no_grad(), reference_only(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            shapes = (tuple(dynamic_shapes(spec).values()),)
            program = torch.export.export(Ordered(spec), arguments, dynamic_shapes=shapes, strict=False)
    except (UserError, InternalTorchDynamoError) as error:
        reason = str(error).strip().splitlines()
        detail = next((line.strip() for line in reason if line.strip().startswith("- ")), reason[0] if reason else "")
        raise RequestError(f"{spec.name}: its graph depends on a size that should be free: {detail}") from error
    finally:
        noisy.disabled = before
        _bind(spec, ())
    simplify(program)
    _check(spec, program, keep)
    return program


def traced(spec: GraphSpec) -> dict[str, int]:
    """The axis sizes a graph is recorded at."""
    return {name: axis.traced for name, axis in spec.axes.items()}


def dynamic_shapes(spec: GraphSpec) -> dict[str, dict[int, Any]]:
    """Which dimensions of which input are free: a `Dim` per axis, or a multiple of one."""
    dims = {name: Dim(name, min=axis.min, max=axis.max) for name, axis in spec.axes.items()}

    def free(size: str) -> Any:
        times = int(size.rpartition("*")[0] or 1)
        return dims[axis_of(size)] if times == 1 else times * dims[axis_of(size)]

    return {p.name: {i: free(size) for i, size in enumerate(p.shape) if isinstance(size, str)} for p in spec.inputs}


def example(
    ports: Sequence[Port], axes: Mapping[str, int], dtype: torch.dtype, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Random inputs of these sizes, the same for every dtype up to rounding to float16."""
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, torch.Tensor] = {}
    for port in ports:
        shape = port.sizes(axes)
        if port.dtype in ("int32", "int64"):
            value = torch.randint(0, 3, shape, generator=generator, dtype=getattr(torch, port.dtype))
        else:
            value = torch.randn(shape, generator=generator, dtype=torch.float32).half().float()
            value = _ranged(port.name, value).to(dtype if port.dtype == MODEL else getattr(torch, port.dtype))
        made[port.name] = value
    return made


def _ranged(name: str, value: torch.Tensor) -> torch.Tensor:
    """Values of the kind the input has: times 1 to 1000, sizes of pictures, images 0..1."""
    if name == "timestep":
        return (value.sigmoid() * 998 + 1).round()
    if name == "time_ids":
        return (value.abs() * 100).round()
    if name in ("controlnet_cond", "conditioning_scale"):
        return value.sigmoid().half().float()
    return value


def _bind(spec: GraphSpec, keep: Sequence[str]) -> None:
    """Every op site of the module to its reference, those of `keep` to the registered op."""
    for module in spec.module.modules():
        if isinstance(module, Site):
            kept = module.op.name in keep
            module.bound = getattr(torch.ops.stepfuse, module.op.name) if kept else module.op.reference


def _check(spec: GraphSpec, program: ExportedProgram, keep: Sequence[str]) -> None:
    """The program has the declared inputs and outputs, no opaque op but the kept ones, and every axis is free."""
    opaque = {
        str(n.target) for n in program.graph.nodes if n.op == "call_function" and str(n.target).startswith(NAMESPACE)
    }
    strangers = sorted(name for name in opaque if name.split(".")[1] not in keep)
    if strangers:
        raise RequestError(
            f"{spec.name}: {', '.join(strangers)} would be opaque to other runtimes; export without kernels"
        )
    values = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    given = list(program.graph_signature.user_inputs)
    assert len(given) == len(spec.inputs), f"{spec.name}: {len(given)} inputs recorded, {len(spec.inputs)} declared"
    for port, node in zip(spec.inputs, given, strict=True):
        for declared, size in zip(port.shape, values[str(node)].shape, strict=True):
            if isinstance(declared, str) and isinstance(size, int):
                raise RequestError(f"{spec.name}: {port.name} was recorded for {declared} = {size} only")
    results = len(program.graph_signature.user_outputs)
    assert results == len(spec.outputs), f"{spec.name}: {results} outputs recorded, {len(spec.outputs)} declared"
