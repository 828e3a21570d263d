"""A mixed load with cancels: every job ends exactly once, and every image equals its solo run."""

from __future__ import annotations

import dataclasses
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stepfuse import Engine, EngineConfig, Request
from stepfuse.engine.errors import Cancelled, DeadlineMissed
from stepfuse.engine.loading import load_components
from stepfuse.engine.request import Job

SAMPLERS = ("ddim", "ddpm", "euler", "euler_a", "heun", "lms", "dpmpp_2m", "pndm", "lcm")


def random_request(rng: random.Random) -> Request:
    return Request(
        prompt=rng.choice(["a photo of a cat", "of", "cat", ""]),
        negative_prompt=rng.choice([None, "blurry"]),
        seed=rng.randrange(10**6),
        n=rng.choice([1, 1, 1, 2, 3]),
        steps=rng.randint(1, 6),
        width=rng.choice([32, 48]),
        height=rng.choice([32, 32, 48]),
        sampler=rng.choice(SAMPLERS),
        guidance_scale=rng.choice([1.0, 3.0, 7.5]),
        guidance_rescale=rng.choice([0.0, 0.0, 0.5]),
        output="latent",
    )


@pytest.mark.slow
def test_200_random_requests_with_cancels(reference_pipeline: Callable[[str], Path]) -> None:
    rng = random.Random(7)
    requests = [random_request(rng) for _ in range(200)]
    doomed = set(rng.sample(range(200), 40))
    jobs: dict[int, Job] = {}
    with Engine.load(reference_pipeline("sd15"), device="cpu", max_rows=6) as engine:

        def send(part: range, pause: random.Random) -> None:
            for number in part:
                jobs[number] = engine.submit(requests[number])
                time.sleep(pause.random() * 0.01)
                if number in doomed:
                    jobs[number].cancel()

        senders = [threading.Thread(target=send, args=(range(i, 200, 4), random.Random(i))) for i in range(4)]
        for sender in senders:
            sender.start()
        for sender in senders:
            sender.join()
        finished, cancelled = {}, 0
        for number, job in jobs.items():
            try:
                finished[number] = job.result(120)
            except Cancelled:
                assert number in doomed, "only what was cancelled may end as cancelled"
                cancelled += 1
        assert len(finished) + cancelled == 200
        assert cancelled > 0
        assert set(range(200)) - set(finished) <= doomed
        assert len(engine._worker.scheduler) == 0, "nothing is left behind"
        assert not engine._worker.batches
        for number, found in finished.items():
            alone = engine.generate(requests[number])
            difference = float((found.latents - alone.latents).norm() / alone.latents.norm())
            assert difference <= 1e-4, requests[number]


def troubled_request(rng: random.Random) -> Request:
    """A small request of the built-in model, some with deadlines: hopeless, short or long."""
    return Request(
        prompt=rng.choice(["a red circle", "a blue square above a circle", ""]),
        seed=rng.randrange(10**6),
        n=rng.choice([1, 1, 2]),
        steps=rng.randint(4, 8),
        width=rng.choice([16, 24]),
        height=16,
        sampler=rng.choice(SAMPLERS),
        guidance_scale=rng.choice([1.0, 3.0]),
        deadline=rng.choice([None, None, None, 1e-6, 0.5, 30.0]),
        client=rng.choice([None, "ann", "bob"]),
        output="latent",
    )


def make_trouble(engine: Engine, monkeypatch: pytest.MonkeyPatch, rng: random.Random) -> Counter[str]:
    """Now and then park a running row and let an update run out of memory; returns how often."""
    scheduler, runner, seen = engine._worker.scheduler, engine.models[None].runner, Counter[str]()
    preempt, update, slow = scheduler.preempt, runner.update, Counter[str]()

    def more_preempt() -> list:
        chosen = [entry for entry in scheduler._running if rng.random() < 0.03]
        scheduler.park([entry.row for entry in chosen])
        seen["parked"] += len(chosen)
        return preempt() + [(entry.row, entry.bucket) for entry in chosen]

    def limited(batch: Any, *rest: Any) -> Any:
        slow["left"] = slow["left"] - 1 if slow["left"] else 2 * (rng.random() < 0.1)  # twice: also the second try
        if slow["left"] and len(batch) > 1:
            seen["out of memory"] += 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return update(batch, *rest)

    monkeypatch.setattr(scheduler, "preempt", more_preempt)
    monkeypatch.setattr(runner, "update", limited)
    return seen


@pytest.mark.parametrize("seed", [1, 2])
def test_every_job_ends_once_whatever_happens(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    requests = [troubled_request(rng) for _ in range(35)]
    parts = load_components("shapes", EngineConfig(device="cpu", max_rows=4))
    parts = dataclasses.replace(parts, config=dataclasses.replace(parts.config, parked_bytes=100_000))
    ends: Counter[int] = Counter()
    with Engine(parts) as engine:
        seen = make_trouble(engine, monkeypatch, rng)
        jobs = []
        for number, request in enumerate(requests):
            jobs.append(engine.submit(request))
            finish = jobs[-1].finish
            jobs[-1].finish = lambda outcome, n=number, f=finish: (ends.update([n]), f(outcome))[1]
            time.sleep(rng.random() * 0.01)
            if rng.random() < 0.2:
                rng.choice(jobs).cancel()
        finished: dict[int, torch.Tensor] = {}
        for number, job in enumerate(jobs):
            try:
                finished[number] = job.result(60).latents
            except Cancelled:
                assert job.cancelled
            except DeadlineMissed:
                assert requests[number].deadline in (1e-6, 0.5)
        assert len(engine._worker.scheduler) == len(engine._worker.batches) == len(engine._worker.batches.bank) == 0
        assert not len(engine._worker.bookings)
        assert seen["parked"] > 5
        assert seen["out of memory"] > 1
        assert 10 < len(finished) < 35
        monkeypatch.undo()
        for number, latents in finished.items():
            request = dataclasses.replace(requests[number], deadline=None)
            alone = engine.generate(request).latents
            assert float((latents - alone).norm() / alone.norm()) <= 1e-4, request
    assert set(ends.values()) <= {1}
