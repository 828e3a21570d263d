"""One ONNX graph to one TensorRT plan: parse, free the attention, set targets and profiles, build into a file.

The same code serves TensorRT 10.x, 11.x and TensorRT-RTX: what a release has is asked of the package, never read from
its version. Precision is that of the graph (strongly typed networks).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ..engine.artifact import Graph
from ..engine.errors import DeviceError, RequestError
from ..engine.runtimes.tensorrt import logger

FUSED_HEAD_DIMS = (16, 24, 32, 40, 48, 64, 72, 80, 96, 128, 160, 192, 256)
"""Head dimensions that TensorRT-RTX 1.7.1 has an attention kernel for, in float16 and, from SM 80, bfloat16; of those
that were tried, 8 and 512 had none."""

BFLOAT16_SINCE = 80
"""The oldest compute capability with bfloat16."""

Progress = Callable[[str, int, int], None]
"""Called with the phase, steps done and steps in all."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a plan is built for.

    flavour: "tensorrt_rtx" or "tensorrt". sms: compute capabilities as 86 or 120; () for `tensorrt`, which builds for
    the GPU it runs on. workspace: bytes of device memory a layer may use; None: no limit. fused_attention: fail where
    an attention has no kernel of its own instead of letting it be decomposed.
    """

    flavour: str = "tensorrt_rtx"
    sms: tuple[int, ...] = (86, 89, 120)
    workspace: int | None = None
    fused_attention: bool = False


@dataclass(frozen=True)
class Attention:
    """One attention of a network: its node and what its kernel depends on. dtype: of torch."""

    name: str
    head_dim: int
    dtype: str

    def unfused(self, sms: Sequence[int]) -> list[int]:
        """The targets without a known attention kernel for it."""
        oldest = {"float16": 0, "bfloat16": BFLOAT16_SINCE}.get(self.dtype, 10**6)
        return [sm for sm in sms if sm < oldest or self.head_dim not in FUSED_HEAD_DIMS]


@dataclass(frozen=True)
class Built:
    """The network a plan was built from, as TensorRT parsed it and before it fused anything.

    layers: by type. precisions: layers by the floating-point dtype of their result.
    """

    attentions: tuple[Attention, ...]
    layers: Mapping[str, int]
    precisions: Mapping[str, int]


def check_target(trt: ModuleType, target: Target) -> None:
    """Raise RequestError for compute capabilities this package cannot build for."""
    if not hasattr(trt, "ComputeCapability"):
        if target.sms:
            raise RequestError(f"--sm: {target.flavour} builds for the GPU it runs on only; leave --sm out")
        return
    known = sorted(int(name[2:]) for name in trt.ComputeCapability.__members__ if name[2:].isdecimal())
    strange = [sm for sm in target.sms if sm not in known]
    if strange or not target.sms:
        others = "" if not strange else "; for others build with --flavour tensorrt on that GPU"
        listed = ", ".join(map(str, known))
        got = ", ".join(map(str, strange)) or "none"
        raise RequestError(f"--sm: got {got}, {target.flavour} {trt.__version__} has {listed}{others}")


def check_dtype(dtype: str, sms: Sequence[int]) -> None:
    """Raise RequestError where a target cannot compute in the dtype of a graph."""
    old = [sm for sm in sms if dtype == "bfloat16" and sm < BFLOAT16_SINCE]
    if old:
        raise RequestError(
            f"--dtype: SM {', '.join(map(str, old))} cannot compute in bfloat16, which SM {BFLOAT16_SINCE} and newer"
            " can: use fp16, or leave the target out"
        )


def build(
    trt: ModuleType, source: Path, plan: Path, graph: Graph, target: Target, progress: Progress | None = None
) -> Built:
    """Build the plan of `graph`, whose model is `source`, into the file `plan`; returns what it was built from.

    Raises RequestError for targets or a graph this package cannot build, DeviceError with TensorRT's own words where
    the build fails. No file is left then.
    """
    check_target(trt, target)
    check_dtype(graph.dtype, target.sms)
    messages = logger(trt).messages
    messages.clear()
    builder = trt.Builder(logger(trt))
    network = _parse(trt, builder, source, graph)
    layers, precisions = _layers(trt, network)
    attentions = _free_attention(trt, network, graph, target)
    config = builder.create_builder_config()
    if hasattr(trt, "ComputeCapability"):
        config.num_compute_capabilities = len(target.sms)
        for index, sm in enumerate(target.sms):
            _require(config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), index), messages)
    if target.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, target.workspace)
    if progress is not None and hasattr(trt, "IProgressMonitor"):
        config.progress_monitor = _monitor(trt, progress)
    _add_profiles(builder, config, network, graph, messages)
    _write(trt, builder, network, config, plan, messages)
    return Built(tuple(attentions), layers, precisions)


def _parse(trt: ModuleType, builder: Any, source: Path, graph: Graph) -> Any:
    """The network of an ONNX file: strongly typed, which is a flag on 10.x and the rule since."""
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, logger(trt))
    if not parser.parse_from_file(os.fspath(source)):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        said = "; ".join(f"{e.node_operator()} {e.node_name()!r}: {e.desc()}" for e in errors)
        older = (
            "" if graph.options.get("opset") == 18 else "; export the model with --opset 21 or 18 for older releases"
        )
        raise RequestError(f"{trt.__name__} {trt.__version__} cannot read {source.name} of {graph.file}: {said}{older}")
    names = {network.get_input(index).name for index in range(network.num_inputs)}
    if names != {port.name for port in graph.inputs}:
        raise RequestError(
            f"{graph.file} has inputs {sorted(names)}, not those of its manifest: export the model again"
        )
    return network


def _free_attention(trt: ModuleType, network: Any, graph: Graph, target: Target) -> list[Attention]:
    """Let every attention be decomposed where there is no kernel for it; where there is one, the plan is the same."""
    if not hasattr(trt, "IAttentionOutputLayer"):
        return []
    dtypes = {getattr(trt.DataType, theirs): ours for theirs, ours in _ELEMENTS.items()}
    found: list[Attention] = []
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type != trt.LayerType.ATTENTION_OUTPUT:
            continue
        layer.__class__ = trt.IAttentionOutputLayer  # get_layer gives the base class
        query = layer.attention.get_input(0)
        found.append(Attention(layer.name, int(query.shape[-1]), dtypes.get(query.dtype, str(query.dtype))))
        layer.attention.decomposable = not target.fused_attention
    without = [attention for attention in found if attention.unfused(target.sms)]
    if target.fused_attention and without:
        first = without[0]
        sms = ", ".join(map(str, first.unfused(target.sms)))
        raise RequestError(
            f"--fused-attention: {graph.file} has an attention of head dim {first.head_dim} in {first.dtype}, no kernel"
            f" on SM {sms}; expected float16 (bfloat16 from SM 80) and one of {', '.join(map(str, FUSED_HEAD_DIMS))};"
            " leave the option out to have it decomposed"
        )
    return found


def _layers(trt: ModuleType, network: Any) -> tuple[dict[str, int], dict[str, int]]:
    """How many layers of every type, and results of every floating-point dtype, the most frequent first."""
    dtypes = {getattr(trt.DataType, theirs): ours for theirs, ours in _ELEMENTS.items()}
    types: Counter[str] = Counter()
    results: Counter[str] = Counter()
    for layer in map(network.get_layer, range(network.num_layers)):
        types[layer.type.name] += 1
        if layer.num_outputs and (dtype := layer.get_output(0).dtype) in dtypes:
            results[dtypes[dtype]] += 1
    return dict(types.most_common()), dict(results.most_common())


def _add_profiles(builder: Any, config: Any, network: Any, graph: Graph, messages: Iterable[str]) -> None:
    tensors = {tensor.name: tensor for tensor in map(network.get_input, range(network.num_inputs))}
    for declared in graph.profiles:
        profile = builder.create_optimization_profile()
        for port in graph.inputs:
            sizes = [
                port.sizes({axis: getattr(size, kind) for axis, size in declared.axes.items()})
                for kind in ("min", "opt", "max")
            ]
            tensor = tensors[port.name]
            (profile.set_shape_input if tensor.is_shape_tensor else profile.set_shape)(port.name, *sizes)
        if config.add_optimization_profile(profile) < 0:
            raise RequestError(f"{graph.file}: profile {declared.name} is not possible: {'; '.join(messages)}")


def _write(trt: ModuleType, builder: Any, network: Any, config: Any, plan: Path, messages: Iterable[str]) -> None:
    """Build into the file, as a stream where the release can: a plan in memory would need its size once more."""
    part = plan.with_suffix(".part")
    try:
        with part.open("wb") as stream:
            if hasattr(builder, "build_serialized_network_to_stream"):
                _require(builder.build_serialized_network_to_stream(network, config, _writer(trt, stream)), messages)
            else:
                built = builder.build_serialized_network(network, config)
                _require(built is not None, messages)
                stream.write(built)
        _require(part.stat().st_size > 0, messages)
        part.replace(plan)
    finally:
        part.unlink(missing_ok=True)


def _writer(trt: ModuleType, stream: Any) -> Any:
    class Writer(trt.IStreamWriter):
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)

        def write(self, data: Any) -> int:
            return stream.write(data)

    return Writer()


def _monitor(trt: ModuleType, progress: Progress) -> Any:
    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps
            progress(phase_name, 0, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            progress(phase_name, step + 1, self.steps[phase_name])
            return True

        def phase_finish(self, phase_name: str) -> None:
            steps = self.steps.pop(phase_name)
            progress(phase_name, steps, steps)

    return Monitor()


def _require(done: bool, messages: Iterable[str]) -> None:
    if not done:
        raise DeviceError(f"TensorRT could not build the plan: {'; '.join(messages) or 'it gave no reason'}")


_ELEMENTS = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}
