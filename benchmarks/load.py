"""Drives a front with a load, K clients in a closed loop or arrivals at given times, and notes what became of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..engine.request import Request, Result
from . import harness
from .fronts import Front

Progress = Callable[[int], None]


@dataclass(frozen=True, eq=False)
class Served:
    """One request: seconds from the start of the run at which it arrived, began to be denoised, and ended."""

    number: int
    request: Request
    result: Result
    arrived: float
    began: float
    ended: float

    @property
    def latency(self) -> float:
        """Seconds from arrival to result; waiting included, also for a late start of the load generator."""
        return self.ended - self.arrived


def open_loop(
    front: Front, requests: Sequence[Request], times: Sequence[float], progress: Progress = lambda done: None
) -> list[Served]:
    """Send request i at `times[i]` seconds whatever became of the others, and wait for all results."""
    return asyncio.run(_open_loop(front, requests, times, progress))


def closed_loop(
    front: Front, requests: Sequence[Request], clients: int, progress: Progress = lambda done: None
) -> list[Served]:
    """`clients` clients take the requests in turn; each sends its next one when it has the last one's result."""
    return asyncio.run(_closed_loop(front, requests, clients, progress))


async def _open_loop(
    front: Front, requests: Sequence[Request], times: Sequence[float], progress: Progress
) -> list[Served]:
    start, done = time.perf_counter(), 0

    async def client(number: int) -> Served:
        nonlocal done
        await asyncio.sleep(max(0.0, start + times[number] - time.perf_counter()))
        served = await _serve(front, number, requests[number], start, times[number])
        done += 1
        progress(done)
        return served

    return list(await asyncio.gather(*(client(number) for number in range(len(requests)))))


async def _closed_loop(front: Front, requests: Sequence[Request], clients: int, progress: Progress) -> list[Served]:
    start, queue, served = time.perf_counter(), iter(enumerate(requests)), []

    async def client() -> None:
        for number, request in queue:
            served.append(await _serve(front, number, request, start, time.perf_counter() - start))
            progress(len(served))

    await asyncio.gather(*(client() for _ in range(clients)))
    return served


async def _serve(front: Front, number: int, request: Request, start: float, arrived: float) -> Served:
    result = await front.run(request)
    ended = time.perf_counter() - start
    began = ended - result.timings["denoise"] - result.timings["decode"]
    return Served(number, request, result, arrived, max(began, arrived), ended)


def summary(served: Sequence[Served]) -> dict[str, Any]:
    """Latency percentiles, and images per second from the first arrival to the last result."""
    images = sum(one.request.n for one in served)
    latencies = [one.latency for one in served]
    return {
        "requests": len(served),
        "images": images,
        "images_per_s": images / (max(one.ended for one in served) - min(one.arrived for one in served)),
        "mean_s": sum(latencies) / len(latencies),
        "p50_s": harness.percentile(latencies, 50),
        "p95_s": harness.percentile(latencies, 95),
    }


def timeline(served: Sequence[Served], most: int = 40) -> list[list[float]]:
    """[arrived, began, ended] of the first requests by arrival, for a picture."""
    first = sorted(served, key=lambda one: one.arrived)[:most]
    return [[round(value, 5) for value in (one.arrived, one.began, one.ended)] for one in first]
