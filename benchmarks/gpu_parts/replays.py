"""Recorded updates against eager ones: rows that come and go in random order, no wait for the device, no new capture.

Without CUDA an update is "recorded" by keeping the function: that runs every line here and proves nothing of a graph.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from ...engine.components import Components
from ...engine.config import EngineConfig
from ...engine.engine import Engine
from ...engine.graphs import WARM_UP, Replayable, Run
from ...engine.loading import load_components
from ...engine.request import Request
from ...engine.runner import Runner
from ..mix import Mix
from .batches import configured, filled, join, model
from .session import Session

ROWS = 4
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Relative L2 of a row's state; padded and exact numbers of rows may take other kernels."""


class Repeated:
    """What stands in for a graph without CUDA: the function, run again."""

    def __init__(self, run: Run) -> None:
        self.replay = run


class Repeater:
    """Records by keeping the function."""

    def record(self, run: Run) -> tuple[Replayable, int]:
        """As `CudaRecorder.record`."""
        for _ in range(WARM_UP):
            run()
        return Repeated(run), 0


def run(session: Session) -> None:
    for name in ("shapes",) if session.tiny else ("shapes", "sd15"):
        ready = cache(lambda n=name: _model(session, n))
        for what, measure in MEASUREMENTS.items():
            if not session.measure(f"{name} {what}", lambda m=measure, r=ready: m(session, r())):
                return


def _model(session: Session, name: str) -> Components:
    """In float32, where there is little to excuse a difference."""
    given = {"device": str(session.device), "dtype": "float32", "max_rows": ROWS}
    parts = load_components(name, EngineConfig(**given)) if name == "shapes" else model(session, name, **given)
    return configured(parts, runner="graph")


def _runner(session: Session, parts: Components) -> Runner:
    return Runner(parts, None if session.cuda else Repeater())


def _requests(session: Session, steps: int) -> Iterator[Request]:
    """Unlike requests without end; small ones in a tiny run."""
    size = {"width": 32, "height": 32} if session.tiny else {}
    for number, request in enumerate(Mix.load("mixed").draw(1000, 7)):
        yield replace(request, steps=steps + number % 3, **size)


def _random_order(session: Session, parts: Components) -> dict[str, Any]:
    """Twin batches, one recorded and one eager; before every update a row leaves or one joins, by chance."""
    rng, coming = random.Random(3), _requests(session, 100)
    recorded, exact = _runner(session, parts), Runner(configured(parts, runner="eager"))
    first = [next(coming) for _ in range(2)]
    ours, theirs = filled(parts, recorded, first), filled(parts, exact, first)
    recorded.warm(ours, ROWS)
    assert recorded.captures is not None
    warmed, sizes, apart = recorded.captures.captured, set(), 0.0
    rounds = 4 if session.tiny else 40
    for _ in range(rounds):
        change = rng.choice(("join", "leave", "stay"))
        if change == "join" and len(ours) < ROWS:
            request = next(coming)
            for batch in (ours, theirs):
                join(parts, batch, request)
        elif change == "leave" and len(ours) > 1:
            gone = [rng.randrange(len(ours))]
            for batch in (ours, theirs):
                with torch.inference_mode():
                    batch.leave(gone)
        sizes.add(ours.model_rows)
        recorded.update(ours)
        exact.update(theirs)
        mine, other = ours.state.x[: len(ours)].double(), theirs.state.x[: len(theirs)].double()
        apart = max(apart, float(((mine - other).flatten(1).norm(dim=1) / other.flatten(1).norm(dim=1)).max()))
    captures = recorded.captures
    allowed = TOLERANCE[parts.config.dtype]
    return {
        "green": apart <= allowed and captures.captured == warmed,
        "largest": apart,
        "allowed": allowed,
        "updates": rounds,
        "model_rows": sorted(sizes),
        "captures": captures.captured,
        "replays": captures.replayed,
    }


def _no_sync(session: Session, parts: Components) -> dict[str, Any]:
    """Updates that would raise if the host waited for the device, over the end of a plan's window."""
    runner = _runner(session, parts)
    batch = filled(parts, runner, [next(_requests(session, 80))])
    runner.update(batch)
    updates = 3 if session.tiny else 75
    with _sync_is_an_error(session):
        for _ in range(updates):
            runner.update(batch)
    return {"green": session.cuda, "checked": session.cuda, "updates": updates}


@contextmanager
def _sync_is_an_error(session: Session) -> Iterator[None]:
    if not session.cuda:
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _captures(session: Session, parts: Components) -> dict[str, Any]:
    """An engine's captures after its warm-up, and after requests of other samplers, steps, guidance and seeds."""
    runner = _runner(session, parts)
    requests = _requests(session, 2)
    pixels = 32 if session.tiny else None
    with Engine(parts, runner) as engine:
        engine.warmup(pixels, pixels, rows=ROWS)
        assert runner.captures is not None
        warmed = runner.captures.captured
        for _ in range(2 if session.tiny else 12):
            engine.generate([replace(next(requests), output="latent") for _ in range(ROWS)])
        after, replayed = runner.captures.captured, runner.captures.replayed
    return {"green": after == warmed, "warmed": warmed, "captured": after, "replayed": replayed}


MEASUREMENTS = {
    "random order against eager": _random_order,
    "no wait for the device": _no_sync,
    "captures of other requests": _captures,
}
