"""Cascades: N requests re-batched at every stage, against one after the other and against stage after stage.

All three use one loaded engine and the same requests, which are there from the start. Stage after stage is the
strongest rival without an engine that knows cascades: all requests are together in each stage, and the next one begins
when the last of them is through. Runs are interleaved, with a second instance of one after the other (A/A).
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from ..engine.cascade import Cascade
from ..engine.errors import RequestError
from ..engine.settling import settle
from ..kernels.timing import time_calls
from . import harness
from .kernel_measurement import claim, spread
from .mix import Mix
from .throughput import TOLERANCE, Notice

if TYPE_CHECKING:
    from ..engine.engine import Engine
    from ..engine.request import Job, Request, Result

KIND = "cascade"
REBATCHED, BY_STAGE, ONE_BY_ONE = "re-batched", "stage after stage", "one after the other"
CONTROL = f"{ONE_BY_ONE} again"
RIVALS = (BY_STAGE, ONE_BY_ONE)
CPU = torch.device("cpu")  # results arrive on the host, so the host's clock sees all of the work on any device


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is run: `requests` requests of a mix through a cascade, at least three `rounds` of each way."""

    cascade: Cascade
    mix: Mix
    requests: int = 8
    rounds: int = 5
    budget_s: float = 120.0
    seed: int = 0


@dataclass(eq=False)
class Run:
    """What one way made of the requests: a result of every stage; jobs: one of the whole, or one of every stage."""

    start: float
    stages: list[list[Result]]
    jobs: list[list[Followed]]

    def ticks(self, engine: Engine) -> list[list[list[float]]]:
        """By request and stage, seconds from the start of its updates; the last is that of the stage's images."""
        made = []
        for jobs, results in zip(self.jobs, self.stages, strict=True):
            parts = [results] if len(jobs) == 1 else [[one] for one in results]
            made.append([t for job, own in zip(jobs, parts, strict=True) for t in job.ticks(self.start, engine, own)])
        return made

    @property
    def ends(self) -> list[float]:
        """Seconds from the start at which every request was through."""
        return [jobs[-1].events[-1][0] - self.start for jobs in self.jobs]


def record(
    engine: Engine, plan: Plan, machine: Mapping[str, Any], notice: Notice = lambda what, done, total: None
) -> dict[str, Any]:
    """Measure; images per second of every way, with the gate of its images, and the ratios of re-batched over others.

    Raises RequestError for a cascade whose stages cannot be made one by one.
    """
    check(plan.cascade)
    requests = [replace(request, output="np") for request in plan.mix.draw(plan.requests, plan.seed)]
    for width, height in {(request.width, request.height) for request in requests}:
        engine.warmup(width, height, cascade=plan.cascade)
    alone: list[Result] = []
    for request in requests:
        alone.append(engine.generate(request, cascade=plan.cascade))
        notice("solo runs", len(alone), len(requests))
    runs: dict[str, Run] = {}
    ways = {ONE_BY_ONE: one_by_one, CONTROL: one_by_one, BY_STAGE: by_stage, REBATCHED: rebatched}
    made = 0

    def call(name: str) -> None:
        nonlocal made
        runs[name] = ways[name](engine, plan.cascade, requests, alone)
        made += 1
        notice(name, made, len(ways) * (plan.rounds + 1))  # once more: the first use of every size

    timings = time_calls(
        {name: [lambda n=name: call(n)] for name in ways}, CPU, rounds=plan.rounds, budget_s=plan.budget_s
    )
    allowed = TOLERANCE[str(engine.components.config.dtype).removeprefix("torch.")]
    images, apart = sum(request.n for request in requests), spread(timings[ONE_BY_ONE], timings[CONTROL])
    gates = {name: gate(run, alone, allowed) for name, run in runs.items()}
    variants = {
        name: {**timing.record(), "images_per_s": images / timing.median_s, "gate": gates[name],
               "mean_end_s": sum(runs[name].ends) / len(requests)}
        for name, timing in timings.items()
    }  # fmt: skip
    speedup = {
        rival: claim(timings[rival].median_s, timings[REBATCHED].median_s, apart)
        if gates[rival]["green"] and gates[REBATCHED]["green"] else None
        for rival in RIVALS
    }  # fmt: skip
    config = engine.components.config
    conditions = {"model": engine.components.name, "cascade": plan.cascade.name, "mix": plan.mix.name,
                  "dtype": str(config.dtype)[6:], "max_rows": config.max_rows, "requests": plan.requests,
                  "rounds": timings[REBATCHED].rounds, "seed": plan.seed}  # fmt: skip
    shown = {name: [_rounded(one) for one in runs[name].ticks(engine)] for name in (REBATCHED, *RIVALS)}
    return harness.measurement(
        KIND, f"{plan.cascade.name} {plan.mix.name}", variants[REBATCHED]["images_per_s"], "images/s", machine,
        conditions, variants=variants, speedup=speedup, a_a_spread=apart, images=images, timelines=shown,
        stages=[dict(stage.settings) for stage in alone[0].stages],
        width=alone[0].images.shape[2], height=alone[0].images.shape[1],
    )  # fmt: skip


def check(cascade: Cascade) -> None:
    """Raise RequestError where a stage takes more than the images of the one before, in one piece."""
    for stage in cascade.stages[1:]:
        if stage.plain or stage.input != "image" or stage.tile is not None:
            raise RequestError(
                f"cascade {cascade.name!r}: stage after stage is made by hand here, from images in one piece; choose a "
                "cascade without tiles, filters and stages that take latents"
            )


# The three ways.


def rebatched(engine: Engine, cascade: Cascade, requests: Sequence[Request], alone: Sequence[Result]) -> Run:
    """All at once: whatever is at the same stage shares updates."""
    start = time.perf_counter()
    jobs = [Followed(engine.submit(request, cascade=cascade)) for request in requests]
    return Run(start, [list(job.result().stages) for job in jobs], [[job] for job in jobs])


def one_by_one(engine: Engine, cascade: Cascade, requests: Sequence[Request], alone: Sequence[Result]) -> Run:
    """Every request goes through all stages before the next one starts."""
    run = Run(time.perf_counter(), [], [])
    for request in requests:
        job = Followed(engine.submit(request, cascade=cascade))
        run.stages.append(list(job.result().stages))
        run.jobs.append([job])
    return run


def by_stage(engine: Engine, cascade: Cascade, requests: Sequence[Request], alone: Sequence[Result]) -> Run:
    """All requests through the first stage, together; then all of them through the next."""
    run = Run(time.perf_counter(), [[] for _ in requests], [[] for _ in requests])
    for index in range(len(cascade.stages)):
        for whole, before, jobs in zip(alone, run.stages, run.jobs, strict=True):
            own = whole.stages[index].request
            if index:
                own = replace(own, image=list(before[-1].images))
            jobs.append(Followed(engine.submit(replace(own, seed=whole.stages[index].seeds[0]))))
        for stages, jobs in zip(run.stages, run.jobs, strict=True):
            stages.append(jobs[-1].result())
    return run


class Followed:
    """A job, and when its events came."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.events: list[tuple[float, int]] = []  # the time of each, and the updates that were done
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def result(self) -> Result:
        """Wait for it. Raises what the job raises."""
        found = self.job.result()
        self._thread.join()
        return found

    def ticks(self, start: float, engine: Engine, stages: Sequence[Result]) -> list[list[float]]:
        """Seconds from `start` of the updates of every stage and, after them, of its images."""
        *events, (end, _) = self.events
        made, before = [], 0
        for stage in stages:
            after = before + updates_of(engine, stage)
            times = [at - start for at, done in events if before < done <= after]
            made.append([*times, times[-1] + stage.timings["decode"]])
            before = after
        for own, following in pairwise(made):
            own[-1] = min(own[-1], following[0])
        made[-1][-1] = end - start
        return made

    def _follow(self) -> None:
        try:
            self.events.extend((time.perf_counter(), event.update) for event in self.job.events())
        except Exception:  # boundary: of a thread; result() raises it, too
            return


def updates_of(engine: Engine, stage: Result) -> int:
    """Network evaluations of one row of a stage."""
    name = stage.request.model
    model = engine.models[None if name == engine.components.name else name]
    return len(settle(model.parts, stage.request).plan.updates)


def gate(run: Run, alone: Sequence[Result], allowed: float) -> dict[str, Any]:
    """The largest relative L2 difference of the latents of any stage from the solo runs. A NaN is red."""
    pairs = [(found.latents, own.latents) for stages, whole in zip(run.stages, alone, strict=True)
             for found, own in zip(stages, whole.stages, strict=True)]  # fmt: skip
    errors = [float((found - own).norm() / own.norm()) for found, own in pairs]
    error = math.nan if any(map(math.isnan, errors)) else max(errors)
    return {"green": error <= allowed, "error": error, "allowed": allowed, "checked": len(alone)}


def _rounded(ticks: Sequence[Sequence[float]]) -> list[list[float]]:
    return [[round(value, 4) for value in stage] for stage in ticks]


def table(found: Mapping[str, Any]) -> Iterator[str]:
    """The record for a terminal."""
    yield f"{found['name']} on {found['device']}: {found['images']} images of {found['width']}x{found['height']}"
    for name, facts in found["variants"].items():
        one = facts["gate"]
        yield (f"  {name:<26} {facts['images_per_s']:8.3g} images/s  (p10 {facts['p10_s']:.3g} s, median "
               f"{facts['median_s']:.3g} s, p90 {facts['p90_s']:.3g} s; mean end {facts['mean_end_s']:.3g} s)  gate "
               f"{'green' if one['green'] else 'RED'} {one['error']:.1e}")  # fmt: skip
    yield f"  A/A spread {100 * found['a_a_spread']:.2g} %"
    yield from (f"  {REBATCHED} over {rival}: {say(found, rival)}" for rival in found["speedup"])


def say(found: Mapping[str, Any], rival: str) -> str:
    """The ratio of images per second over a rival, in words."""
    value = found["speedup"][rival]
    if value is None:
        return "no ratio: a correctness gate is red"
    return value if isinstance(value, str) else f"{value:.2f}x"
