"""Rows against static batching: a closed loop and Poisson arrivals, on the built-in model and at SD 1.5's size."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...engine.engine import Engine
from .. import harness, throughput
from ..mix import Mix
from ..throughput import Plan
from .batches import model
from .session import Session

MAX_ROWS = 16
PLAN = Plan(mix=Mix.load("mixed"), requests=48, clients=16, rounds=1, checked=4)
TINY = Mix("tiny", {"prompt": ["a red circle"], "steps": [1, 2], "sampler": ["ddim"]})


def run(session: Session) -> None:
    for name in ("tiny",) if session.tiny else ("shapes", "sd15"):
        if not session.measure(f"{name} mixed", lambda n=name: _measure(session, n)):
            return


def _measure(session: Session, name: str) -> dict[str, Any]:
    """Writes what each run found as it ends; returns the comparison at an equal 95th percentile."""
    plan = replace(PLAN, mix=TINY, requests=4, clients=2, checked=1, rates=(50.0,)) if session.tiny else PLAN
    machine = harness.fingerprint(str(session.device))
    record: dict[str, Any] = {}
    with _engine(session, name) as engine:
        for record in throughput.records(engine, plan, machine):
            facts = {key: value for key, value in record.items() if key not in ("time", "kind", "name", "fingerprint")}
            if record["kind"] != throughput.KIND:
                session.write(f"{name} {record['kind']}, {record['name']}", **facts)
            record = facts
    return record


def _engine(session: Session, name: str) -> Engine:
    if name == "shapes":
        return Engine.load(name, device=str(session.device), dtype=session.dtype, max_rows=MAX_ROWS)
    return Engine(model(session, name, max_rows=2 if session.tiny else MAX_ROWS))
