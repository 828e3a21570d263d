"""A simulated load on a virtual clock: joining between updates against batches of equal requests that run to their end.

Pure arithmetic: times come from a table, so the numbers are those of the policy and not of a machine.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from stepfuse.engine.scheduler import Scheduler

CAP = 8
MERGE_WAIT = 0.05
STEPS = (4, 20, 30, 50)


@dataclass(eq=False)
class Arrival:
    """One image of `steps` updates; two settings of guidance cannot be merged by a batcher of equal requests."""

    time: float
    steps: int
    setting: tuple[int, int] = (0, 0)
    left: int = field(init=False)

    def __post_init__(self) -> None:
        self.left = self.steps


def update_seconds(bucket: object, rows: int) -> float:
    """An update of n rows below saturation: 10 ms and 1 ms for every further row."""
    return 0.010 + 0.001 * (rows - 1)


def poisson(rate: float, count: int, seed: int) -> Iterator[Arrival]:
    rng, now = random.Random(seed), 0.0
    for _ in range(count):
        now += rng.expovariate(rate)
        steps = rng.choice(STEPS)
        yield Arrival(now, steps, (steps, rng.randrange(2)))


def run_rows(arrivals: list[Arrival]) -> list[float]:
    """Latency of every request where rows join and leave between updates."""
    now, coming, latencies = 0.0, deque(arrivals), []
    scheduler: Scheduler[Arrival] = Scheduler(CAP, cost=update_seconds, clock=lambda: now)
    running: set[Arrival] = set()
    while coming or len(scheduler):
        if not len(scheduler):
            now = max(now, coming[0].time)
        while coming and coming[0].time <= now:
            one = coming.popleft()
            scheduler.add(one, "only", updates=one.steps)
        running |= {row for row, _ in scheduler.admit()}
        bucket = scheduler.pick()
        now += update_seconds(bucket, len(running))
        for row in running:
            row.left -= 1
        done = {row for row in running if not row.left}
        scheduler.remove(done)
        running -= done
        latencies += [now - row.time for row in done]
    return latencies


def run_static(arrivals: list[Arrival]) -> list[float]:
    """Latency of every request where equal requests that come within MERGE_WAIT run as one batch to its end."""
    now, waiting, latencies = 0.0, list(arrivals), []
    while waiting:
        first = waiting[0]
        now = max(now, first.time + MERGE_WAIT)
        batch = [one for one in waiting if one.time <= now and one.setting == first.setting][:CAP]
        now += first.steps * update_seconds("only", len(batch))
        latencies += [now - one.time for one in batch]
        waiting = [one for one in waiting if one not in batch]
    return latencies


def p95(latencies: list[float]) -> float:
    return sorted(latencies)[int(0.95 * len(latencies))]


@pytest.mark.parametrize("rate", [3.0, 8.0])
def test_rows_shorten_the_tail_at_the_same_load(rate: float):
    rows, static = (run(list(poisson(rate, 600, seed=5))) for run in (run_rows, run_static))
    assert len(rows) == len(static) == 600
    assert p95(rows) < p95(static) / 1.5
    assert min(rows) >= 4 * 0.010 - 1e-9


def test_an_idle_engine_is_as_fast_as_a_single_request():
    assert run_rows([Arrival(1.0, 20)]) == [pytest.approx(20 * 0.010)]
