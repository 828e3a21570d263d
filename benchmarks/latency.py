"""End-to-end latency of one engine: prompt to pixels, with its phases; one request at a time, n rows in one batch."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import harness

if TYPE_CHECKING:
    from ..engine.engine import Engine


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is timed: `repeats` requests of n images each, after `warmup` requests that are not counted."""

    model: str = "shapes"
    prompt: str = "a red circle above a blue square"
    n: int = 1
    repeats: int = 10
    warmup: int = 2
    options: tuple[tuple[str, Any], ...] = ()


def measure(engine: Engine, workload: Workload, progress: Callable[[int], None] | None = None) -> dict[str, Any]:
    """Time `workload` on a loaded engine; one request at a time, the next after the last, each with its own seed.

    Returns seconds per request (p50, p90, p99 and all), percentiles of each phase, seconds per update while denoising,
    updates and images per second, and the settings that ran. "rest" is what no phase claims: queueing and hand-over.
    Raises ValueError for repeats < 1.
    """
    if workload.repeats < 1:
        raise ValueError(f"repeats: got {workload.repeats}, expected at least 1")
    options = dict(workload.options)
    seconds, phases, result, updates = [], [], None, 0
    for index in range(-workload.warmup, workload.repeats):
        start = time.perf_counter()
        job = engine.submit(workload.prompt, seed=max(index, 0) * workload.n, n=workload.n, **options)
        for event in job.events():
            updates = event.total
        result = job.result()
        elapsed = time.perf_counter() - start
        if index >= 0:
            seconds.append(elapsed)
            spent = {name: value for name, value in result.timings.items() if name != "total"}
            phases.append({**spent, "rest": elapsed - sum(spent.values())})
            if progress:
                progress(index + 1)
    assert result is not None
    by_phase = {name: harness.percentiles([p[name] for p in phases]) for name in phases[0]}
    whole = harness.percentiles(seconds)
    denoise = by_phase["denoise"]["p50_s"]
    return {
        "model": result.model,
        "settings": dict(result.settings),
        "updates": updates,
        "n": workload.n,
        "repeats": workload.repeats,
        **whole,
        "phases_s": {name: found["p50_s"] for name, found in by_phase.items()},
        "phase_percentiles": by_phase,
        "t_update_s": denoise / updates,
        "it_per_s": updates / denoise,
        "images_per_s": workload.n / whole["p50_s"],
        "seconds": seconds,
    }


def knee(images_per_s: dict[int, float], enough: float = 0.9) -> int:
    """The fewest rows that give `enough` of the highest images per second while denoising: more rows only add waiting.

    images_per_s: rows -> rows per second of denoising. Raises ValueError for no measurement.
    """
    if not images_per_s:
        raise ValueError("no row counts were measured; expected at least one")
    best = max(images_per_s.values())
    return min(rows for rows, rate in images_per_s.items() if rate >= enough * best)
