"""The ways to run one network that are compared: ours, and the configurations that users of diffusers choose.

A variant says what it really is: versions, layout, the attention backend that the profiler saw, compilations. One that
cannot run here is refused with the reason, never left out silently.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.binding import Binder
from ..engine.config import EngineConfig, resolve
from . import exported, harness
from .architectures import Network
from .footprint import trace
from .gpu_parts.unets import priority

BASELINE, CONTROL = "diffusers eager", "diffusers eager again"
OURS, OURS_GRAPH = "stepfuse eager", "stepfuse graph"
ONNX = "ONNX Runtime, our export"
NO_COMPILE = "left out (--compile turns it on; the default on CUDA only)"
NO_ONNX = "left out (--onnx turns it on; the default for shapes only: exporting takes long)"
REFUSALS = (RuntimeError, ValueError, NotImplementedError, ImportError, AttributeError, TypeError, KeyError)
"""What a variant may raise without ending the comparison: no memory, no compiler, an unsupported device."""

Evaluate = Callable[[Any], Tensor]
"""One evaluation of the diffusers module it is given."""


@dataclass(eq=False)
class Variant:
    """`call()` gives a new result; `replay()`, where there is one, is what is timed: the captured graph of `call`."""

    name: str
    call: Callable[[], Tensor]
    facts: dict[str, Any] = field(default_factory=dict)
    replay: Callable[[], object] | None = None
    own: bool = False

    @property
    def timed(self) -> Callable[[], object]:
        """What is timed."""
        return self.replay or self.call


class Lineup:
    """Variants of one network that ran once, and the reasons of those that did not."""

    def __init__(
        self, network: Network, theirs: Evaluate, ours: Callable[[Any], Callable[[], Tensor]], *, compiled: bool,
        exported: bool,
    ) -> None:  # fmt: skip
        """ours: an evaluation of the network it is given, which is ours or stands in for it."""
        self.network, self.theirs, self.ours, self.compiled, self.exported = network, theirs, ours, compiled, exported
        self.variants: list[Variant] = []
        self.refused: dict[str, str] = {}
        self._folder = TemporaryDirectory(prefix="stepfuse-compare-")  # goes with the lineup

    def gather(self) -> None:
        """Set up everything that can run on this machine; eager baseline, control and ours first."""
        net, cuda = self.network, self.network.device.type == "cuda"
        self._add(BASELINE, lambda: self._theirs(net.theirs))
        self._add(CONTROL, lambda: self._theirs(net.theirs))
        self._add(OURS, self._own, own=True)
        self._add("diffusers channels-last", lambda: self._theirs(net.nhwc))
        if cuda:
            self._add(OURS_GRAPH, self._own, graph=True, own=True)
            self._add("diffusers channels-last, cuDNN attention", lambda: self._theirs(net.nhwc, "cudnn"))
            self._add("diffusers channels-last, fused q/k/v, cuDNN attention, graph",
                      lambda: self._theirs(self._fused(), "cudnn"), graph=True)  # fmt: skip
        if self.compiled:
            self._add("diffusers channels-last, compiled" + (", cuDNN attention, graph" if cuda else ""),
                      lambda: self._compiled("cudnn" if cuda else ""), graph=cuda)  # fmt: skip
        else:
            self.refused["torch.compile"] = NO_COMPILE
        self._add("diffusers, xformers attention", self._xformers)
        if self.exported:
            self._add(ONNX, self._onnx)
        else:
            self.refused[ONNX] = NO_ONNX

    def _add(
        self, name: str, make: Callable[[], tuple[Callable[[], Tensor], dict[str, Any]]], *, graph: bool = False,
        own: bool = False,
    ) -> None:  # fmt: skip
        try:
            call, facts = make()
            call()
            facts = {"versions": versions(name, own), "dtype": _short(self.network.dtype)} | facts
            facts["attention_used"] = attention_used(call, self.network.device)
            replay = capture(call) if graph else None
            self.variants.append(Variant(name, call, facts | {"cuda_graph": graph}, replay, own))
        except REFUSALS as error:
            text = str(error).splitlines()
            self.refused[name] = f"{type(error).__name__}: {text[0] if text else ''}"[:300]

    def _theirs(self, module: Any, attention: str = "") -> tuple[Callable[[], Tensor], dict[str, Any]]:
        def call() -> Tensor:
            with priority(attention):
                return self.theirs(module)

        return call, {"layout": layout(module), "compile": "none", "attention_asked": attention or "torch's own order"}

    def _own(self) -> tuple[Callable[[], Tensor], dict[str, Any]]:
        net = self.network
        binder = Binder(net.ours, resolve(EngineConfig(device=str(net.device), dtype=net.dtype)))
        call = self.ours(net.ours)
        binder.bind("compared", call)
        used = Counter(
            f"{site.op}: {site.implementation}" for table in binder.dispatches.values() for site in table.sites.values()
        )
        return call, {"layout": layout(net.ours), "compile": "none", "kernels": dict(used)}

    def _fused(self) -> Any:
        if self.network.kind != "unet":
            raise ValueError("fused q/k/v is compared for the U-Net only")
        twin = self.network.twin(self.network.nhwc)
        twin.fuse_qkv_projections()
        return twin

    def _compiled(self, attention: str) -> tuple[Callable[[], Tensor], dict[str, Any]]:
        twin = self._fused() if self.network.kind == "unet" else self.network.twin(self.network.nhwc)
        compilations = Compilations()
        torch._dynamo.reset()
        part = twin if self.network.kind == "unet" else twin.decoder
        part.forward = torch.compile(part.forward, fullgraph=True, dynamic=False, backend=compilations)
        call, facts = self._theirs(twin, attention)
        call()
        call()
        facts |= {"compile": "inductor, fullgraph, static shapes", "graph_breaks": compilations.count - 1,
                  "recompiles": compilations.count - 1}  # fmt: skip
        if compilations.count != 1:
            raise RuntimeError(f"compiled {compilations.count} graphs, expected one: it breaks or recompiles")
        return call, facts

    def _xformers(self) -> tuple[Callable[[], Tensor], dict[str, Any]]:
        if importlib.util.find_spec("xformers") is None:
            raise ImportError("xformers is not installed")
        if self.network.device.type != "cuda":
            raise ValueError("xformers attention runs on CUDA only")
        twin = self.network.twin(self.network.nhwc)
        twin.enable_xformers_memory_efficient_attention()
        return self._theirs(twin)

    def _onnx(self) -> tuple[Callable[[], Tensor], dict[str, Any]]:
        module = exported.session(self.network, Path(self._folder.name))
        return self.ours(module), {"compile": "none", "threads": torch.get_num_threads()}


class Compilations:
    """An Inductor backend that counts what it compiles: one graph means no break and no recompilation."""

    def __init__(self) -> None:
        self.count = 0
        self.inductor: Callable[[Any, list[Any]], Any] | None = None
        """What compiles a graph; Inductor for None, which is loaded with the first one."""

    def __call__(self, graph: Any, inputs: Sequence[Any]) -> Any:
        if self.inductor is None:
            from torch._inductor.compile_fx import compile_fx

            self.inductor = compile_fx
        self.count += 1
        return self.inductor(graph, list(inputs))


def capture(call: Callable[[], Tensor]) -> Callable[[], None]:
    """`call` as a CUDA graph, after three runs in which libraries choose their algorithms; returns its replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay


def attention_used(call: Callable[[], object], device: torch.device) -> dict[str, int]:
    """Attention operators of one call and how often each ran, as the profiler saw them; {} where there are none."""
    names = Counter(event.name for event in trace(call, device).events() or ())
    wanted = ("scaled_dot_product", "xformers", "stepfuse::attention")
    found = {name: count for name, count in names.items() if any(word in name for word in wanted)}
    leaves = {name: count for name, count in found.items() if name.startswith("aten::_")}
    return leaves or found


def layout(module: nn.Module) -> str:
    """ "channels-last", "contiguous" or both, by the memory of the convolutions' weights."""
    weights = [p for p in module.parameters() if p.dim() == 4 and min(p.shape[2:]) > 1]
    last = sum(p.is_contiguous(memory_format=torch.channels_last) for p in weights)
    plain = sum(p.is_contiguous() for p in weights)
    if last == len(weights):
        return "channels-last"
    return "contiguous" if plain == len(weights) else f"{last} of {len(weights)} convolutions channels-last"


def versions(name: str, own: bool = False) -> dict[str, str]:
    """Of the packages that a variant runs through. own: it is ours."""
    packages = harness.fingerprint()["packages"]
    wanted = ["torch", "triton"] + ([] if own else ["diffusers"]) + (["xformers"] if "xformers" in name else [])
    wanted = ["onnxruntime", "onnx", "onnxscript"] if name == ONNX else wanted
    return {package: packages[package] for package in wanted if package in packages}


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
