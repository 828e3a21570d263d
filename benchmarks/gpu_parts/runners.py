"""Runner ablation: one guided update as the engine makes it, eager, captured, and compiled and captured.

Two modes at a time are timed interleaved, with a second instance of the simpler one (A/A). The whole update is timed:
denoiser, guidance, sampler step, and what the host does around them. The error is that of the change an update makes
to the latents, against the eager update in float32 on the same weights.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from ...engine.components import Components
from ...engine.request import Request
from ...engine.runner import Runner
from ...kernels.timing import time_calls
from ..kernel_measurement import claim, spread
from .batches import STEPS, Updates, configured, filled, model
from .session import Session, relative_error

CASES = {"sd15 512^2": "sd15", "sdxl 1024^2": "sdxl"}
PAIRS = (("graph", "eager"), ("compiled", "graph"))
REQUEST = Request(prompt="a red circle above a blue square", steps=STEPS, guidance_scale=2.0, seed=1)


def run(session: Session) -> None:
    for case, arch in {"tiny": "tiny"}.items() if session.tiny else CASES.items():
        ready = cache(lambda a=arch: _ready(session, a))
        for mode, beside in PAIRS:
            key = f"{case} n=1 {mode} beside {beside}"
            if not session.measure(key, lambda m=mode, b=beside, r=ready: _measure(session, m, b, *r())):
                return


def _ready(session: Session, arch: str) -> tuple[Components, torch.Tensor]:
    """The model, and the change its first update makes in float32."""
    exact = model(session, arch, max_rows=1, dtype="float32", runner="eager", kernels="reference")
    updates = _updates(session, exact, "eager")
    updates()
    truth = updates.moved()
    del exact, updates
    return model(session, arch, max_rows=1), truth


def _updates(session: Session, parts: Components, mode: str) -> Updates:
    parts = configured(parts, runner=mode)
    runner = Runner(parts)
    for compiled in runner.compiled.values() if session.tiny else ():
        compiled.backend = "eager"
    return Updates(runner, filled(parts, runner, [REQUEST]))


def _measure(session: Session, mode: str, beside: str, parts: Components, truth: torch.Tensor) -> dict[str, Any]:
    again, errors, calls = f"{beside} again", {}, {}
    for name in (beside, again, mode):
        updates = _updates(session, parts, name.removesuffix(" again"))
        updates()
        moved = updates.moved()
        if not bool(moved.isfinite().all()):
            raise ValueError(f"the update is not finite by runner={name!r}")
        errors[name], calls[name] = relative_error(moved, truth), [updates]
    timings = time_calls(calls, session.device, rounds=3 if session.tiny else 30, graph=False, budget_s=10.0)
    apart = spread(timings[beside], timings[again])
    green = errors[mode] <= 2 * errors[beside] + 1e-7
    facts: dict[str, Any] = {
        "ms": 1e3 * timings[mode].median_s,
        "error_vs_float32": errors[mode],
        "beside": beside,
        "gate": green,
        "speedup": claim(timings[beside].median_s, timings[mode].median_s, apart) if green else None,
        "a_a_spread": apart,
        "variants": {name: {"error": errors[name], **timing.record()} for name, timing in timings.items()},
        "runner": calls[mode][0].runner.explain().splitlines()[0],
    }
    if session.cuda:
        facts["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 2**30
    return facts
