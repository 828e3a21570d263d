"""Where the time of a request goes: every kernel (CUDA) or operation (CPU) by kind, and a trace for a viewer.

A profile gives shares, never times: the profiler slows small kernels, and on a CPU every call.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..engine.models.vae import AutoencoderKL
from .footprint import trace
from .latency import Workload

if TYPE_CHECKING:
    from ..engine.components import Components
    from ..engine.engine import Engine

KINDS = {
    "attention": r"scaled_dot_product|sdpa|flash|attention|fmha",
    "other": r"copy|memset|clone|catarray|\bcat\b|gather|index",
    "conv": r"conv|fprop|implicit_gemm|winograd",
    "gemm": r"gemm|addmm|matmul|nvjet|cublas|cutlass|mkldnn_linear|splitk|\bb?mm\b",
    "pointwise": r"elementwise|vectorized|norm|silu|gelu|geglu|softmax|sigmoid|clamp|sqrt|sampler_step|reduce|triton|"
    r"upsample|isfinite|logical|\b(add|mul|div|sub|exp|sin|cos|pow|mean|sum|var)(_?\b)",
}
"""Patterns in the names of kernels and operations; the first kind that matches wins, "other" where none does. Norms
count as pointwise: like them they are bound by memory."""


def measure(
    engine: Engine, workload: Workload, output: Path | None = None, notice: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Profile one request of `workload` after `warmup` others; writes a Chrome trace to `output`.

    Returns `kinds` (share of the time and calls by kind), `top` (the costliest kernels or operations) and `ranges`
    (time of each network as a share, from marks around its calls; under a captured graph there are none).
    """
    device = engine.components.config.device
    run = _warm(engine, workload)
    notice("profiling one request")
    with marked(engine.components):
        found = trace(run, device, shapes=True)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        found.export_chrome_trace(str(output))
    return summary(found, device) | {"trace": None if output is None else output.name, "n": workload.n}


def mark_only(engine: Engine, workload: Workload) -> None:
    """Run one request with NVTX ranges and without torch's profiler, which cannot run beside Nsight Systems."""
    run = _warm(engine, workload)
    with marked(engine.components):
        run()


def _warm(engine: Engine, workload: Workload) -> Callable[[], None]:
    """Run the requests before the one that counts, and return that one."""
    options: dict[str, Any] = dict(workload.options) | {"n": workload.n, "seed": 0}
    for _ in range(workload.warmup):
        engine.generate(workload.prompt, **options)

    def run() -> None:
        with _mark("request", engine.components.config.device):
            engine.generate(workload.prompt, **options)

    return run


def summary(found: torch.profiler.profile, device: torch.device) -> dict[str, Any]:
    """Shares by kind, the twenty costliest names, and the marked ranges of a profile."""
    cuda = device.type == "cuda"
    spent: dict[str, list[float]] = {}
    ranges: dict[str, float] = {}
    for event in found.events() or ():
        on_device = event.device_type == torch.autograd.DeviceType.CUDA
        if event.name.startswith(MARK):
            if not on_device:
                name = event.name.removeprefix(MARK)
                ranges[name] = ranges.get(name, 0.0) + event.cpu_time_total
        elif on_device == cuda and (cuda or event.name.startswith(("aten::", "stepfuse::"))):
            entry = spent.setdefault(event.name, [0.0, 0])
            entry[0] += event.device_time_total if cuda else event.self_cpu_time_total
            entry[1] += 1
    total = sum(time for time, _ in spent.values()) or 1.0
    kinds: dict[str, dict[str, float]] = {}
    for name, (time, calls) in spent.items():
        entry = kinds.setdefault(kind_of(name), {"share": 0.0, "calls": 0})
        entry["share"] += time / total
        entry["calls"] += int(calls)
    top = sorted(spent.items(), key=lambda item: -item[1][0])[:20]
    return {
        "what": "kernels" if cuda else "operations (CPU, self time)",
        "kinds": dict(sorted(kinds.items(), key=lambda item: -item[1]["share"])),
        "top": [{"name": name[:160], "kind": kind_of(name), "share": time / total, "calls": int(calls)}
                for name, (time, calls) in top],
        "ranges": {name: time / ranges["request"] for name, time in ranges.items()} if "request" in ranges else {},
    }  # fmt: skip


def kind_of(name: str) -> str:
    """attention, conv, gemm, pointwise or other, from the name of a kernel or an operation."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name.lower())), "other")


def table(found: Mapping[str, Any]) -> Iterator[str]:
    """A profile for a terminal."""
    yield f"shares of {found['what']}; no times: the profiler slows small calls"
    for kind, facts in found["kinds"].items():
        yield f"  {kind:<10} {100 * facts['share']:5.1f} %  {facts['calls']:>6} calls"
    yield "costliest"
    for entry in found["top"][:12]:
        yield f"  {100 * entry['share']:5.1f} %  {entry['calls']:>6} calls  {entry['kind']:<10} {entry['name'][:80]}"
    if found["ranges"]:
        yield "networks and blocks, share of the request on the host"
        for name, share in sorted(found["ranges"].items(), key=lambda item: -item[1]):
            yield f"  {100 * share:5.1f} %  {name}"


MARK = "stepfuse: "


@contextmanager
def marked(parts: Components) -> Iterator[None]:
    """Marks around every call of the networks and of the denoiser's blocks: profiler ranges, and NVTX on CUDA."""
    modules = dict(networks(parts))
    modules |= {f"denoiser.{name}": child for name, child in parts.unet.named_children() if name != "conv_in"}
    modules |= {
        f"denoiser.{name}.{i}": block
        for name in ("down_blocks", "up_blocks")
        for i, block in enumerate(getattr(parts.unet, name, ()))
    }
    handles = [handle for name, module in modules.items() for handle in _hooks(name, module, parts.config.device)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def networks(parts: Components) -> Mapping[str, nn.Module]:
    """The networks of a checkpoint by name."""
    found: dict[str, nn.Module] = {"denoiser": parts.unet}
    for index, encoder in enumerate(parts.text):
        found[f"text encoder {index + 1}"] = encoder.model
    if isinstance(parts.vae, AutoencoderKL):
        found["decoder"] = parts.vae.decoder
    return found


def _hooks(name: str, module: nn.Module, device: torch.device) -> list[Any]:
    open_marks: list[Any] = []  # one network is called by one thread, the engine's

    def before(*_: Any) -> None:
        mark = _mark(name, device)
        mark.__enter__()
        open_marks.append(mark)

    def after(*_: Any) -> None:
        open_marks.pop().__exit__(None, None, None)

    return [module.register_forward_pre_hook(before), module.register_forward_hook(after, always_call=True)]


@contextmanager
def _mark(name: str, device: torch.device) -> Iterator[None]:
    with torch.profiler.record_function(MARK + name):
        if device.type == "cuda":
            torch.cuda.nvtx.range_push(MARK + name)
        try:
            yield
        finally:
            if device.type == "cuda":
                torch.cuda.nvtx.range_pop()
