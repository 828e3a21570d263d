"""Our engine end to end with the built-in model: prompt to pixels, alone and in batches."""

from __future__ import annotations

from typing import Any

from ..latency import Workload, measure
from .session import Session


def run(session: Session) -> None:
    for n in (1,) if session.tiny else (1, 4, 16):
        if not session.measure(f"shapes n={n}", lambda count=n: _measure(session, count)):
            return


def _measure(session: Session, n: int) -> dict[str, Any]:
    from ...engine.engine import Engine

    options = (("steps", 2),) if session.tiny else ()
    workload = Workload(n=n, repeats=1 if session.tiny else 20, warmup=1, options=options)
    with Engine.load("shapes", device=str(session.device)) as engine:
        return measure(engine, workload)
