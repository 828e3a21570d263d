"""A row that is set aside in the middle of its run and goes on later gives the bits it would have given."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from stepfuse import Engine, EngineConfig, Job, Request
from stepfuse.engine import batch as batch_module
from stepfuse.engine import pipeline
from stepfuse.engine import runner as runner_module
from stepfuse.engine.batch import Batch, Saved
from stepfuse.engine.components import Components
from stepfuse.engine.errors import Cancelled, EngineClosed
from stepfuse.engine.loading import load_components
from stepfuse.engine.parking import Bank
from stepfuse.engine.runner import Runner
from stepfuse.engine.settling import Settled, settle

SIZE: dict[str, Any] = {"width": 32, "height": 32}
PICTURE = np.random.default_rng(0).random((32, 32, 3), dtype=np.float32)
HALF = np.tri(32, dtype=np.float32)
KINDS = {
    "history": Request(prompt="a red circle", seed=1, steps=7, sampler="dpmpp_2m", guidance_scale=4.0, **SIZE),
    "longer history": Request(prompt="a red circle", seed=1, steps=7, sampler="lms", **SIZE),
    "noise": Request(prompt="a blue square", seed=2, steps=7, sampler="euler_a", **SIZE),
    "noise and two evaluations": Request(prompt="circle", seed=3, steps=5, sampler="heun", s_churn=2.0, **SIZE),
    "rescaled guidance": Request(prompt="circle", seed=4, steps=6, sampler="ddim", guidance_rescale=0.6, **SIZE),
    "one branch": Request(prompt="circle", seed=5, steps=6, sampler="ddpm", guidance_scale=1.0, **SIZE),
    "window": Request(prompt="a circle", seed=6, steps=23, sampler="ddpm", **SIZE),
    "known image": Request(prompt="circle", seed=7, steps=6, sampler="euler_a", image=PICTURE, mask=HALF),
}


@pytest.fixture(scope="module")
def parts() -> Components:
    return load_components("shapes", EngineConfig(device="cpu", max_rows=4))


@pytest.fixture
def windowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans of more than six updates pass through a window."""
    for module in (batch_module, runner_module):
        monkeypatch.setattr(module, "WINDOW", 6)


class Lane:
    """One request run by hand."""

    def __init__(self, parts: Components, request: Request) -> None:
        self.parts, self.runner = parts, Runner(parts)
        self.settled: Settled = settle(parts, request)
        with torch.inference_mode():
            ((self.conditioning, _),) = pipeline.encode(parts, [self.settled])

    @torch.inference_mode()
    def join(self, batch: Batch) -> Batch:
        batch.join(pipeline.start(self.parts, self.settled, self.conditioning, [0]), [self])
        return batch

    @torch.inference_mode()
    def run(self, batch: Batch, updates: int) -> None:
        for _ in range(updates):
            self.runner.update(batch)

    @torch.inference_mode()
    def save(self, batch: Batch, keep: bool) -> Saved:
        return batch.save(batch.owners.index(self), keep)

    @torch.inference_mode()
    def restore(self, batch: Batch, saved: Saved) -> Batch:
        given = saved.prepared
        prepared = pipeline.prepare(self.parts, self.settled, self.conditioning, [0]) if given is None else given
        batch.restore(saved, prepared)
        return batch

    @property
    def updates(self) -> int:
        return len(self.settled.plan.updates)


@pytest.mark.usefixtures("windowed")
@pytest.mark.parametrize("keep", [True, False], ids=["kept", "computed again"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_restored_row_gives_the_same_bits(parts: Components, kind: str, keep: bool) -> None:
    lane = Lane(parts, KINDS[kind])
    whole = lane.join(Batch(4))
    lane.run(whole, lane.updates)
    expected = whole.state.x[0].clone()
    for parked in range(1, lane.updates, 1 if lane.updates < 12 else 5):
        batch = lane.join(Batch(4))
        lane.run(batch, parked)
        saved = lane.save(batch, keep)
        with torch.inference_mode():
            batch.leave([0])
            batch.state.x.fill_(float("nan"))  # what it left behind is used by others
            batch.state.history.fill_(float("nan"))
            batch.state.known.fill_(float("nan"))
        again = lane.restore(Batch(4), saved)
        lane.run(again, lane.updates - parked)
        assert torch.equal(again.state.x[0], expected), parked
        assert not again.state.bad.any()


@pytest.mark.usefixtures("windowed")
def test_a_row_goes_on_beside_others_and_in_a_wider_or_narrower_batch(parts: Components) -> None:
    """Positions, model rows and the room for branches are the batch's; everything else is the row's."""
    lane, others = Lane(parts, KINDS["one branch"]), [Lane(parts, KINDS[k]) for k in ("noise", "window")]
    alone = lane.join(Batch(4))
    lane.run(alone, lane.updates)
    narrow = lane.join(Batch(4))
    lane.run(narrow, 2)
    wide = others[1].join(others[0].join(Batch(4)))
    lane.restore(wide, lane.save(narrow, keep=True))
    lane.run(wide, 2)
    assert wide.width == 2
    position = wide.owners.index(lane)
    saved = lane.save(wide, keep=True)
    with torch.inference_mode():
        wide.leave([position])
    last = lane.restore(Batch(4), saved)
    assert last.width == 1
    lane.run(last, lane.updates - 4)
    expected = alone.state.x[0]
    assert float((last.state.x[0] - expected).norm() / expected.norm()) <= 1e-5
    for other in others:  # nobody was disturbed
        own = other.join(Batch(4))
        other.run(own, 2)
        mine = wide.state.x[wide.owners.index(other)]
        assert float((mine - own.state.x[0]).norm() / own.state.x[0].norm()) <= 1e-5


def test_a_restored_row_takes_nothing_from_the_row_that_had_its_place(parts: Components) -> None:
    lane, other = Lane(parts, KINDS["one branch"]), Lane(parts, KINDS["noise"])
    saved = lane.save(lane.join(Batch(4)), keep=True)
    wide = other.join(Batch(4))
    assert wide.state.weights[0].all(), "two branches"
    with torch.inference_mode():
        wide.leave([0])
    lane.restore(wide, saved)
    assert wide.state.weights[0].tolist() == [1.0, 0.0]


@pytest.mark.usefixtures("windowed")
def test_above_its_budget_the_bank_keeps_no_prompts(parts: Components) -> None:
    lane = Lane(parts, KINDS["window"])
    batch = lane.join(Batch(4))
    lane.run(batch, 8)
    full, bare = lane.save(batch, keep=True), lane.save(batch, keep=False)
    assert full.prepared.time.shape[1] == 23, "the whole plan's, not the window's"
    assert full.bytes - bare.bytes == sum(t.numel() * 4 for t in (full.prepared.time, full.prepared.kv))
    assert full.seat.time is None
    bank: Bank[str] = Bank(full.bytes + bare.bytes)
    for name in ("first", "second"):
        bank.put(name, lane.save(batch, keep=True))
    assert [bank[name].prepared is None for name in ("first", "second")] == [False, True]
    assert bank.bytes == full.bytes + bare.bytes
    bank.shrink()
    assert bank.bytes == 2 * bare.bytes
    bank.remove("first")
    bank.remove("nobody")
    assert ("first" in bank, "second" in bank, len(bank)) == (False, True, 1)


# In the engine.


class Preempting:
    """An engine whose scheduler parks all running rows when the test says so."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch, when: Callable[[int], bool]) -> None:
        scheduler, self.loops, self.parked = engine._worker.scheduler, 0, threading.Event()

        def preempt() -> list:
            self.loops += 1
            rows = [entry.row for entry in scheduler._running] if when(self.loops) else []
            pairs = [(row, scheduler._home[row].bucket) for row in rows]
            scheduler.park(rows)
            if rows:
                self.parked.set()
            return pairs

        monkeypatch.setattr(scheduler, "preempt", preempt)


@pytest.mark.parametrize("parked_bytes", [None, 1])
def test_jobs_that_are_parked_again_and_again_equal_their_solo_runs(
    parts: Components, monkeypatch: pytest.MonkeyPatch, parked_bytes: int | None
) -> None:
    config = dataclasses.replace(parts.config, parked_bytes=parked_bytes or parts.config.parked_bytes)
    requests = [dataclasses.replace(request, output="latent") for request in KINDS.values()]
    with Engine(dataclasses.replace(parts, config=config)) as engine:
        alone = [engine.generate(request) for request in requests]
        Preempting(engine, monkeypatch, lambda loop: loop % 3 == 0)
        for found, expected, request in zip(engine.generate(requests), alone, requests, strict=True):
            assert float((found.latents - expected.latents).norm() / expected.latents.norm()) <= 1e-4, request
        one = engine.generate(requests[0])
        assert torch.equal(one.latents, alone[0].latents), "the same model rows in every update: the same bits"
        assert len(engine._worker.batches.bank) == 0


def hold_parked(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Job:
    """A long job that was parked in its second update and stays so."""
    held = Preempting(engine, monkeypatch, lambda loop: loop == 3)
    admit = engine._worker.scheduler.admit
    monkeypatch.setattr(engine._worker.scheduler, "admit", lambda: [] if held.parked.is_set() else admit())
    job = engine.submit("a red circle", steps=500, sampler="ddim", **SIZE)
    assert held.parked.wait(30)
    return job


def test_a_parked_job_can_be_cancelled(parts: Components, monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine(parts) as engine:
        job = hold_parked(engine, monkeypatch)
        job.cancel()
        with pytest.raises(Cancelled):
            job.result(30)
        monkeypatch.undo()
        assert engine.generate("a circle", steps=1, **SIZE).images
        assert (len(engine._worker.scheduler), len(engine._worker.batches), len(engine._worker.batches.bank)) == (
            0,
            0,
            0,
        )


def test_a_parked_job_ends_when_the_engine_is_closed(parts: Components, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(parts)
    job = hold_parked(engine, monkeypatch)
    engine.close()
    with pytest.raises(EngineClosed):
        job.result(5)
    assert (len(engine._worker.scheduler), len(engine._worker.batches), len(engine._worker.batches.bank)) == (0, 0, 0)
