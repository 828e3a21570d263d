"""A mixed load with cancels: every job ends exactly once, and every image equals its solo run."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from stepfuse import Engine, Request
from stepfuse.engine.errors import Cancelled
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
        assert len(engine._scheduler) == 0, "nothing is left behind"
        assert not engine._batches
        for number, found in finished.items():
            alone = engine.generate(requests[number])
            difference = float((found.latents - alone.latents).norm() / alone.latents.norm())
            assert difference <= 1e-4, requests[number]
