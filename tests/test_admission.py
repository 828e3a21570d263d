"""What the engine refuses, what comes too late, who is served first, and what it believes an update costs."""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from stepfuse import Engine, EngineConfig, Job
from stepfuse.engine import batch as batch_module
from stepfuse.engine import pipeline
from stepfuse.engine.batch import Batch
from stepfuse.engine.components import Components
from stepfuse.engine.env import physical_memory
from stepfuse.engine.errors import Cancelled, DeadlineMissed, MemoryBudgetError, QueueFull, RequestError
from stepfuse.engine.loading import load_components
from stepfuse.engine.request import build_request
from stepfuse.engine.scheduling.costs import CLIP, MeasuredCosts
from stepfuse.engine.settling import settle
from stepfuse.engine.ticket import Bucket

SIZE: dict[str, Any] = {"width": 32, "height": 32}
LONG: dict[str, Any] = {"steps": 900, "sampler": "ddim", **SIZE}


def pixels(bucket: Any) -> int:
    return bucket[0] * bucket[1]


@pytest.fixture(scope="module")
def parts() -> Components:
    return load_components("shapes", EngineConfig(device="cpu", max_rows=2))


@pytest.fixture
def engine(parts: Components) -> Iterator[Engine]:
    with Engine(parts) as made:
        yield made


def configured(parts: Components, **options: Any) -> Engine:
    return Engine(dataclasses.replace(parts, config=dataclasses.replace(parts.config, **options)))


def occupied(engine: Engine, rows: int = 2, **fields: Any) -> list[Job]:
    """Long jobs that run and leave no room."""
    jobs = [engine.submit("a red circle", **LONG | fields) for _ in range(rows)]
    for job in jobs:
        next(iter(job.events()))
    return jobs


def order_of_ends(jobs: list[Job]) -> list[int]:
    """Filled with the numbers of the jobs as they end."""
    ended: list[int] = []
    for number, job in enumerate(jobs):
        job._future.add_done_callback(lambda _, number=number: ended.append(number))
    return ended


# Costs.


def test_a_size_beyond_the_machine_is_refused_before_anything_runs(engine: Engine) -> None:
    with pytest.raises(MemoryBudgetError, match="100000"):
        engine.submit("a circle", width=100_000, height=100_000)


def test_costs_are_measured_interpolated_and_scaled():
    costs = MeasuredCosts(pixels)
    assert costs((8, 8, 77), 3) == 0.0, "nothing is known yet"
    for rows, seconds in ((2, 1.0), (6, 2.0)):
        costs.note((8, 8, 77), rows, 50.0)
        costs.note((8, 8, 77), rows, seconds)
    assert [costs((8, 8), rows) for rows in (1, 2, 4, 6, 9)] == pytest.approx([1.0, 1.0, 1.5, 2.0, 3.0])
    assert costs((16, 4, 12, True), 2) == 1.0, "as many pixels"
    assert costs((16, 16), 6) == pytest.approx(8.0), "four times the pixels"
    costs.note((16, 16), 6, 5.0)
    assert costs((32, 16), 6) == pytest.approx(10.0), "the nearest size counts"


def test_costs_follow_slowly_and_forget_a_warm_up_at_once():
    costs = MeasuredCosts(pixels, smoothing=0.5)
    for seconds, expected in ((9.0, 9.0), (1.0, 1.0), (2.0, 1.5), (100.0, 1.5 + 0.5 * (CLIP - 1) * 1.5)):
        costs.note((8, 8), 2, seconds)
        assert costs((8, 8), 2) == pytest.approx(expected)


def test_the_engine_measures_its_updates(engine: Engine) -> None:
    began = time.perf_counter()
    engine.generate("a circle", steps=12, **SIZE)
    spent = time.perf_counter() - began
    assert (
        0.2 * spent < 12 * engine._worker.scheduler._backlog.update_seconds(Bucket(32, 32, None, False), 2) < 5 * spent
    )


# The bound of the queue.


def test_a_full_queue_refuses_and_says_when_to_come_back(parts: Components) -> None:
    with configured(parts, queue_seconds=1.0) as engine:
        engine.generate("a circle", steps=5, **SIZE)  # an update takes milliseconds: 900 of them, seconds
        occupied(engine, rows=1)
        with pytest.raises(QueueFull, match=r"queue full: got .* s of work, bound 1 s") as refused:
            engine.submit("a circle", **LONG)
        assert 0 < refused.value.retry_after <= refused.value.estimated_wait
        with pytest.raises(QueueFull):
            engine.generate(["a circle"] * 2, **LONG)
        assert len(engine._worker.scheduler) == 1, "all of a list or none"
        assert not engine._worker.inbox


def test_what_was_accepted_and_is_not_queued_yet_counts(parts: Components, monkeypatch: pytest.MonkeyPatch) -> None:
    with configured(parts, queue_seconds=1.0) as engine:
        engine.generate("a circle", steps=5, **SIZE)
        encode, busy, go = pipeline.encode, threading.Event(), threading.Event()

        def slow(*args: Any) -> Any:
            busy.set()
            assert go.wait(30)
            return encode(*args)

        monkeypatch.setattr(pipeline, "encode", slow)
        first = engine.submit("a circle", **LONG)
        assert busy.wait(30), "the first is being encoded; the scheduler is empty"
        with pytest.raises(QueueFull):
            engine.submit("a circle", **LONG)
        go.set()
        first.cancel()
        with pytest.raises(Cancelled):
            first.result(30)
        assert engine.submit("a circle", steps=1, **SIZE).result(30).images, "nothing stays booked"
        assert not len(engine._worker.bookings)


def test_without_a_bound_nothing_is_refused(engine: Engine) -> None:
    engine.generate("a circle", steps=2, **SIZE)
    jobs = [engine.submit("a circle", **LONG) for _ in range(30)]
    assert not any(job.done for job in jobs)


# Memory.


def test_a_size_that_never_fits_is_refused_by_submit(parts: Components) -> None:
    with configured(parts, memory_bytes=20e6) as engine:
        assert engine.generate("a circle", steps=1, **SIZE).images
        with pytest.raises(MemoryBudgetError, match=r"one row of 2048x2048 needs .* GB, budget 20\.0 MB; lower width"):
            engine.submit("a circle", width=2048, height=2048, steps=1)
        with pytest.raises(MemoryBudgetError, match="or use guidance_scale=1"):
            engine.submit("a circle", width=2048, height=2048, steps=1, guidance_scale=3.0)
        assert len(engine._worker.scheduler) == 0


@pytest.mark.parametrize("steps", [5, 80])
def test_the_bytes_of_a_row_are_those_of_its_buffers(engine: Engine, parts: Components, steps: int) -> None:
    settled = settle(
        parts, build_request("a circle", {"steps": steps, "sampler": "ddim", "guidance_scale": 3.0, **SIZE})
    )
    with torch.inference_mode():
        ((conditioning, _),) = pipeline.encode(parts, [settled])
        batch = Batch(1)
        batch.join(pipeline.start(parts, settled, conditioning, [0]), ["a"])
        seat = batch.seats[0]
    kept = sum(t.numel() * t.element_size() for t in (seat.table, seat.time) if t is not None)
    assert (seat.table is None) == (steps <= batch_module.WINDOW)
    size = engine.models[None].admission.row(settled)
    assert size.held(2) == pytest.approx(batch.bytes + kept, rel=0.02)
    assert size.activations > size.held(1) / 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory_gb": 0}, "memory_gb: got 0, expected a number > 0"),
        ({"memory_gb": math.nan}, "memory_gb: got nan"),
        ({"queue_seconds": -1.0}, "queue_seconds: got -1.0, expected a number > 0"),
        ({"queue_seconds": "1"}, "queue_seconds: got '1'"),
        ({"parked_bytes": 0}, "parked_bytes: got 0"),
    ],
)
def test_impossible_bounds_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        load_components("shapes", EngineConfig(device="cpu", **options))


def test_the_queue_has_no_bound_and_memory_that_of_the_machine_unless_others_are_asked_for(parts: Components) -> None:
    assert (parts.config.memory_bytes, parts.config.queue_seconds) == (physical_memory(), math.inf)
    asked = load_components("shapes", EngineConfig(device="cpu", memory_gb=0.5, queue_seconds=9))
    assert (asked.config.memory_bytes, asked.config.queue_seconds) == (5e8, 9)


# Deadlines, clients, cancellation.


def test_a_deadline_that_passes_before_the_start_ends_the_job(engine: Engine) -> None:
    running = occupied(engine)
    late = engine.submit("a circle", deadline=0.01, **LONG)
    with pytest.raises(DeadlineMissed, match=r"deadline: the request did not start within 0\.01 s"):
        late.result(30)
    assert not any(job.done for job in running)


def test_a_running_job_is_not_ended_by_its_deadline(engine: Engine) -> None:
    """Three images, two of which fit: the third starts after the deadline."""
    job = engine.submit("a circle", n=3, deadline=0.05, steps=12, output="latent", seed=1, **SIZE)
    events = job.events()
    next(events)
    time.sleep(0.06)
    found = job.result(30)
    assert found.timings["denoise"] > 0.05
    assert len(found.latents) == 3


def test_a_deadline_goes_before_requests_without_one(engine: Engine) -> None:
    running = occupied(engine)
    jobs = [engine.submit("a circle", steps=2, deadline=d, output="latent", **SIZE) for d in (None, 50.0, 30.0)]
    ended = order_of_ends(jobs)
    running[0].cancel()
    for job in jobs:
        job.result(30)
    assert ended[:2] == [2, 1]


def test_clients_take_turns(engine: Engine) -> None:
    running = occupied(engine, client="x")
    many = [engine.submit("a circle", steps=3, client="many", output="latent", **SIZE) for _ in range(6)]
    few = engine.submit("a circle", steps=3, client="few", output="latent", **SIZE)
    ended = order_of_ends([*many, few])
    running[0].cancel()
    few.result(30)
    assert ended.index(6) <= 2, "the seventh in the queue does not wait for all six"


def test_a_waiting_job_can_be_cancelled(engine: Engine) -> None:
    running = occupied(engine)
    waiting = engine.submit("a circle", **LONG)
    before = len(running[0]._log)
    waiting.cancel()
    with pytest.raises(Cancelled):
        waiting.result(30)
    assert len(running[0]._log) - before < 20
    assert not any(job.done for job in running)


def test_cancelling_an_ended_job_holds_nothing(engine: Engine) -> None:
    job = engine.submit("a circle", steps=1, **SIZE)
    job.result(30)
    assert job.cancel() is False
    assert not engine._worker.cancelled, "an ended job is not held"
