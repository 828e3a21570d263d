"""One AOT package: a graph recorded for a bucket of sizes, with the engine's kernels in it, and compiled.

A bucket fixes everything but the rows. With free rows one package serves every number of rows of a resolution: right
where code does not depend on their number, as on a CPU. With fixed rows there is a package for each number: right on
CUDA, where the measured choice of kernels and their launch configurations are constants of the recorded graph.
"""

from __future__ import annotations

import warnings
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import InternalTorchDynamoError, UserError
from torch.export import Dim, ExportedProgram

from ..engine.artifact import Profile, Range
from ..engine.errors import RequestError
from ..kernels.dispatch import Dispatch, Site, record, resolve
from ..kernels.op import UnsupportedCallError
from ..kernels.policy import Choice, reference_only
from .program import Ordered, example
from .simplify import simplify
from .spec import GraphSpec

SETTINGS: dict[str, Any] = {
    "aot_inductor.package_constants_in_so": False,  # the weights lie beside the packages, once
    "always_keep_tensor_constants": True,  # none of them becomes part of the code
    "aot_inductor.enable_line_tables": False,
    "cpp.march": "",  # only the vector extensions that the manifest lists; as fast as "native" (docs/export_aoti.md)
}
INSIDE = ("aten", "prims", "higher_order")
"""Namespaces of operators that packages run without Python."""


def buckets(
    spec: GraphSpec, shapes: Sequence[tuple[int, int]], rows: Sequence[int], fixed_rows: bool
) -> tuple[Profile, ...]:
    """The packages of a graph: one per resolution, and with `fixed_rows` one per number of rows.

    Raises RequestError for a resolution or rows the graph cannot have.
    """
    made = []
    for profile in spec.profiles(shapes, rows):
        axes = {name: Range(size.opt, size.opt, size.opt) for name, size in profile.axes.items()}
        spans = [(n, n) for n in sorted(set(rows))] if fixed_rows else [(min(rows), max(rows))]
        for low, high in spans:
            own = {name: Range(low, high, high) for name in ("rows", "steps") if name in axes}
            name = f"{profile.name}_rows{low}" if fixed_rows else profile.name
            made.append(Profile(name, axes | own))
    return tuple(made)


def inputs_of(spec: GraphSpec, bucket: Profile, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Random inputs of the usual sizes of a bucket."""
    sizes = {name: size.opt for name, size in bucket.axes.items()}
    return {name: value.to(device) for name, value in example(spec.inputs, sizes, dtype).items()}


def bind(spec: GraphSpec, inputs: Mapping[str, Tensor], kernels: Choice) -> dict[str, int]:
    """Put the kernels for these inputs into the graph; returns how many sites use which.

    As in the engine the measured record decides, on a CPU for the references. What only Python can run (xformers,
    flash-attn) cannot be packaged: where the record has it the site takes the Triton kernel or, where that does not
    fit, the reference. Raises RequestError for an explicit choice that cannot be honoured.
    """
    device = next(iter(inputs.values())).device.type
    try:
        calls = None
        if device != "cpu" or kernels != "auto":
            with torch.no_grad():
                calls = record(spec.module, lambda: spec.module(**inputs))
        dispatch = resolve(spec.module, device, kernels, calls)
    except UnsupportedCallError as error:
        raise RequestError(str(error)) from None
    dispatch.bind(spec.module)
    if kernels == "auto" and calls is not None:
        _replace_foreign(spec, dispatch, calls)
    return dict(Counter(f"{site.op.name}: {_bound_name(site)}" for site in _sites(spec).values()))


def unbind(spec: GraphSpec) -> None:
    """Every site back to its reference."""
    for site in _sites(spec).values():
        site.bound = site.op.reference


def record_program(spec: GraphSpec, bucket: Profile, inputs: Mapping[str, Tensor]) -> ExportedProgram:
    """The graph as bound, with the rows of the bucket free. Raises RequestError where it cannot be packaged."""
    rows = bucket.axes["rows"]
    free = {} if rows.min == rows.max else {"rows": Dim("rows", min=rows.min, max=rows.max)}
    if free:
        free["steps"] = free["rows"]  # a time per row
    shapes = tuple({i: free[size] for i, size in enumerate(p.shape) if size in free} for p in spec.inputs)
    try:
        with torch.no_grad(), reference_only(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(Ordered(spec), tuple(inputs.values()), dynamic_shapes=(shapes,), strict=False)
    except (UserError, InternalTorchDynamoError) as error:
        raise RequestError(
            f"{spec.name} with {rows.min} to {rows.max} rows cannot be recorded; give --fixed-rows: {error}"
        ) from error
    simplify(program)
    _check(spec, program)
    return program


def compile_package(program: ExportedProgram, path: Path) -> None:
    """Compile a program to the package at `path`, without the sources: they name folders of this machine.

    Raises RequestError without a C++ compiler.
    """
    from torch._inductor import aoti_compile_and_package
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise RequestError("AOT packages need a C++ compiler: install g++ or clang, or set CXX to yours") from error
    whole = path.with_suffix(".whole.pt2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        aoti_compile_and_package(program, package_path=str(whole), inductor_configs=SETTINGS)
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(path, "w") as stripped:
        for entry in source.infolist():
            if not entry.filename.endswith(".cpp"):
                stripped.writestr(entry, source.read(entry))
    whole.unlink()


def _replace_foreign(spec: GraphSpec, dispatch: Dispatch, calls: Mapping[str, Any]) -> None:
    for path, site in _sites(spec).items():
        if dispatch.sites[path].implementation in ("vendor:xformers", "vendor:flash_attn"):
            triton = site.op.implementations.get("triton")
            fits = triton is not None and triton.unsupported(calls[path]) is None
            site.bound = triton.call if fits and triton is not None else site.op.reference


def _check(spec: GraphSpec, program: ExportedProgram) -> None:
    """No operator that needs Python when the package runs: Triton kernels are recorded as what they launch."""
    called = {node.target for node in program.graph.nodes if node.op == "call_function"}
    foreign = sorted(
        op._name
        for op in called
        if isinstance(op, torch._ops.OpOverload) and op.namespace not in INSIDE and not _is_triton(op)
    )
    if foreign:
        raise RequestError(f"{spec.name}: packages cannot run {', '.join(foreign)} without Python: use other kernels")
    results = len(program.graph_signature.user_outputs)
    assert results == len(spec.outputs), f"{spec.name}: {results} outputs recorded, {len(spec.outputs)} declared"


def _is_triton(op: torch._ops.OpOverload) -> bool:
    return op.namespace == "stepfuse" and op._opname.endswith("_triton")


def _bound_name(site: Site) -> str:
    return next((name for name, found in site.op.implementations.items() if found.call is site.bound), "reference")


def _sites(spec: GraphSpec) -> dict[str, Site]:
    return {path: module for path, module in spec.module.named_modules() if isinstance(module, Site)}
