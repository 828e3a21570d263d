"""One op at one shape: every implementation that can run the call, right or wrong, warm and cold, against each other.

Rivals are torch eager, torch.compile of the reference and whatever the registry holds. All are timed interleaved with a
copy of the same bytes and with a second instance of torch eager (A/A): differences below twice its spread are "equal".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..kernels.op import REGISTRY, Op
from ..kernels.timing import GRAPH_LAUNCHES, Timing, buffers_for_cold, time_call, time_calls
from . import ceilings, gate, kernel_work
from .harness import ClockLog
from .kernel_shapes import Shape

# What a variant may raise without ending the measurement: an unsupported call, out of memory, a failed compilation.
VARIANT_ERRORS = (RuntimeError, ValueError, NotImplementedError, ImportError, AttributeError, TypeError, KeyError)
RIVALS = ("reference", "compiled")
CONTROL, COPY = "reference again", "copy"


@dataclass(frozen=True)
class Settings:
    """Where and how to measure; product_tflops: the sustained roof that attention is compared with."""

    device: torch.device
    dtype: torch.dtype
    compiled: bool = True
    rounds: int = 12
    budget_s: float = 1.5
    product_tflops: float | None = None


def measure(shape: Shape, settings: Settings) -> dict[str, Any]:
    """The record of `shape`: work, gates, times, speed-ups, and why variants that did not run were refused.

    Its headline: the fastest variant with a green gate, and its median warm time in microseconds.
    """
    op, device = REGISTRY[shape.op], settings.device
    first = shape.make(device, settings.dtype)
    with torch.no_grad():
        exact = gate.truth(op.reference, first)
        plain = gate.tensors(op.reference(**first))
        work = kernel_work.count(op.name, first, plain)
        rotate = buffers_for_cold(work.bytes, device)
        buffers = [first, *(shape.make(device, settings.dtype, seed) for seed in range(1, rotate))]
        variants, gates, refused = _variants(op, first, plain, exact, settings)
        if "reference" not in variants:
            raise RuntimeError(f"{op.name}: the torch reference does not run on this call: {refused['reference']}")
        del exact, plain
        with ClockLog() as clocks:
            timings = _time(variants, buffers, work, settings)
    states = sorted({state for _, state in timings}, reverse=True)  # warm, cold
    spreads = {state: spread(timings["reference", state], timings[CONTROL, state]) for state in states}
    record: dict[str, Any] = {
        "op": op.name,
        "model": shape.model,
        "shape": shape.name,
        "count": shape.count,
        "dtype": str(settings.dtype).removeprefix("torch."),
        "bytes": work.bytes,
        "accounting": work.accounting,
        "flops": work.flops,
        "rotated_buffers": rotate,
        "a_a_spread": spreads,
        "copy": {state: _rates(timings[COPY, state], work.bytes) for state in states},
        "refused": refused,
        "clocks": clocks.summary(),
    }
    record["variants"] = {
        name: {
            "gate": gates[name].record(),
            **{state: _facts(timings, name, state, work, settings) for state in states},
            "speedup": {state: _speedups(timings, gates, name, state, spreads[state]) for state in states},
        }
        for name in variants
    }
    right = [name for name in variants if gates[name].green]
    record["fastest"] = min(right, key=lambda name: timings[name, "warm"].median_s, default=None)
    if record["fastest"]:
        record["us"] = 1e6 * timings[record["fastest"], "warm"].median_s
    return record


def _variants(
    op: Op, first: Mapping[str, Any], plain: Any, exact: Any, settings: Settings
) -> tuple[dict[str, Callable[..., Any]], dict[str, gate.Gate], dict[str, str]]:
    """Variants that run, their gates, and the reason of every one that does not."""
    call = op.describe(**first)
    calls: dict[str, Callable[..., Any]] = {}
    refused: dict[str, str] = {}
    for name in ("reference", *(n for n in op.implementations if n != "reference")):
        reason = op.implementations[name].unsupported(call)
        if reason is None:
            calls[name] = op.implementations[name].call
        else:
            refused[name] = reason
    if settings.compiled:
        torch._dynamo.reset()  # a ninth shape of one function would silently run eagerly
        calls["compiled"] = torch.compile(op.reference, fullgraph=True, dynamic=False)
    gates: dict[str, gate.Gate] = {}
    for name, function in list(calls.items()):
        try:
            gates[name] = gate.judge(gate.tensors(function(**first)), plain, exact)
            time_call(lambda f=function: f(**first), settings.device, rounds=1, launches=1)  # it can be captured
        except VARIANT_ERRORS as error:
            text = str(error).splitlines()
            refused[name] = f"{type(error).__name__}: {text[0] if text else ''}"[:300]
            gates.pop(name, None)
            del calls[name]
    return calls, gates, refused


def _time(
    variants: Mapping[str, Callable[..., Any]],
    buffers: list[dict[str, Any]],
    work: kernel_work.Work,
    settings: Settings,
) -> dict[tuple[str, str], Timing]:
    """(variant, "warm" or "cold") -> timing, all interleaved; cold only where buffers rotate."""
    copies = ceilings.copies(work.bytes, len(buffers), settings.device)
    sequences: dict[tuple[str, str], list[Callable[[], object]]] = {}
    for state in ("warm", "cold") if settings.device.type == "cuda" else ("warm",):
        some = slice(1 if state == "warm" else len(buffers))
        sequences[COPY, state] = copies[some]
        for name, function in ((CONTROL, variants["reference"]), *variants.items()):
            sequences[name, state] = [lambda f=function, a=arguments: f(**a) for arguments in buffers[some]]
    keys = {f"{name} {state}": (name, state) for name, state in sequences}
    timings = time_calls(
        {text: sequences[key] for text, key in keys.items()},
        settings.device,
        rounds=settings.rounds,
        launches=_launches(work),
        budget_s=settings.budget_s,
    )
    return {key: timings[text] for text, key in keys.items()}


def _launches(work: kernel_work.Work) -> int:
    """Launches of one graph: fifty for kernels under 50 us, fewer for longer ones; at rates of a large GPU."""
    expected = max(work.bytes / 3e12, work.flops / 3e14, 1e-6)
    return max(4, min(GRAPH_LAUNCHES, math.ceil(GRAPH_LAUNCHES * 50e-6 / expected)))


def _rates(timing: Timing, nbytes: int) -> dict[str, Any]:
    return {"us": 1e6 * timing.median_s, "gb_per_s": 1e-9 * nbytes / timing.median_s, **timing.record()}


def _facts(
    timings: Mapping[tuple[str, str], Timing], name: str, state: str, work: kernel_work.Work, settings: Settings
) -> dict[str, Any]:
    timing = timings[name, state]
    facts = _rates(timing, work.bytes)
    facts["percent_of_copy"] = 100 * timings[COPY, state].median_s / timing.median_s
    if work.flops:
        facts["tflops"] = 1e-12 * work.flops / timing.median_s
        if settings.product_tflops:
            facts["percent_of_product"] = 100 * facts["tflops"] / settings.product_tflops
    return facts


def spread(a: Timing, b: Timing) -> float:
    """How far two instances of the same thing lie apart, relative: in median, 10th or 90th percentile, the largest."""
    pairs = ((a.median_s, b.median_s), (a.p10_s, b.p10_s), (a.p90_s, b.p90_s))
    return max(abs(x - y) / min(x, y) for x, y in pairs)


def _speedups(
    timings: Mapping[tuple[str, str], Timing], gates: Mapping[str, gate.Gate], name: str, state: str, spread: float
) -> dict[str, float | str]:
    """Rival's time over this one's, or "equal"; nothing for a variant whose gate is red, nor over such a rival."""
    return {
        rival: claim(timings[rival, state].median_s, timings[name, state].median_s, spread)
        for rival in RIVALS
        if rival in gates and rival != name and gates[name].green and gates[rival].green
    }


def claim(rival_s: float, own_s: float, spread: float) -> float | str:
    """rival_s / own_s, or "equal" where they differ by less than twice the A/A spread."""
    return "equal" if abs(rival_s - own_s) <= 2 * spread * min(rival_s, own_s) else rival_s / own_s
