"""End-to-end latency of one engine: prompt to pixels, p50 and p90, updates and images per second."""

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

    Returns seconds per request (p50, p90 and all), the median of each phase, updates per second while denoising, images
    per second, and the settings that ran. Raises ValueError for repeats < 1.
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
            phases.append(dict(result.timings))
            if progress:
                progress(index + 1)
    assert result is not None
    median = {name: harness.percentile([p[name] for p in phases], 50) for name in phases[0]}
    p50 = harness.percentile(seconds, 50)
    return {
        "model": result.model,
        "settings": dict(result.settings),
        "updates": updates,
        "n": workload.n,
        "repeats": workload.repeats,
        "p50_s": p50,
        "p90_s": harness.percentile(seconds, 90),
        "phases_s": median,
        "it_per_s": updates / median["denoise"],
        "images_per_s": workload.n / p50,
        "seconds": seconds,
    }
