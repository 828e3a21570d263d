"""What a launch costs: on the host without a graph, on the device inside one, and with programmatic dependent launch.

The gap between kernels of a graph times the launches of an evaluation is time no kernel can win back; dependent launch
lets a kernel start its prologue while its predecessor drains.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from ...kernels.timing import time_call
from .session import Session


def run(session: Session) -> None:
    launches = 20 if session.tiny else 1000
    for size in (1, 1 << 20):
        session.measure(f"host, {launches} adds of {size}", lambda s=size: _host(session, s, launches))
        if session.cuda:
            session.measure(f"graph, {launches} adds of {size}", lambda s=size: _graph(session, s, launches))
    if session.cuda:
        for dependent in (False, True):
            key = f"graph, {launches} Triton adds, dependent launch {'on' if dependent else 'off'}"
            session.measure(key, lambda d=dependent: _triton(session, launches, d))


def _host(session: Session, size: int, launches: int) -> dict[str, Any]:
    x = torch.zeros(size, device=session.device)
    rounds = []
    for _ in range(5):
        if session.cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(launches):
            x.add_(1.0)
        rounds.append(time.perf_counter() - start)  # time to submit; the device may still be running
        if session.cuda:
            torch.cuda.synchronize()
    return {"us_per_launch": 1e6 * min(rounds) / launches}


def _graph(session: Session, size: int, launches: int) -> dict[str, Any]:
    x = torch.zeros(size, device=session.device)
    timing = time_call(lambda: x.add_(1.0), session.device, rounds=20, launches=launches)
    return {"us_per_launch": 1e6 * timing.median_s, **timing.record()}


def _triton(session: Session, launches: int, dependent: bool) -> dict[str, Any]:
    from .launch_kernel import add_one

    kernel: Any = add_one
    x = torch.zeros(1 << 16, device=session.device)
    grid = (x.numel() // 1024,)

    def launch() -> None:
        kernel[grid](x, BLOCK=1024, DEPENDENT=dependent, num_warps=4, num_stages=1, launch_pdl=dependent)

    x.zero_()
    launch()
    right = bool((x == 1).all())
    timing = time_call(launch, session.device, rounds=20, launches=launches)
    return {"us_per_launch": 1e6 * timing.median_s, "right": right, **timing.record()}
