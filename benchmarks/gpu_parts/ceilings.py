"""What the device can do at best: matrix products in a burst and sustained, copies by size, fp8 products.

A burst of ten products runs at clocks that twenty seconds of them do not hold; both are recorded with the clock log,
and fractions of a roof name which roof. Copies are size-matched yardsticks for memory-bound kernels; they
count bytes read and bytes written.
"""

from __future__ import annotations

from typing import Any

import torch

from ...kernels.timing import buffers_for_cold, time_call, time_calls
from ..ceilings import sustained_product
from .session import Session

MEGABYTES = (0.25, 1, 4, 16, 64, 256, 1024)


def run(session: Session) -> None:
    size = 256 if session.tiny else 8192
    session.measure(f"gemm burst {size}", lambda: _burst(session, size))
    for megabytes in MEGABYTES[:2] if session.tiny else MEGABYTES:
        session.measure(f"copy {megabytes} MB", lambda mb=megabytes: _copies(session, mb))
    session.measure(f"gemm fp8 {size}", lambda: _fp8(session, size))
    session.measure(f"gemm sustained {size}", lambda: _sustained(session, size))


def _operands(session: Session, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    make = {"device": session.device, "dtype": session.dtype}
    return torch.randn(size, size, **make), torch.randn(size, size, **make), torch.empty(size, size, **make)


def _burst(session: Session, size: int) -> dict[str, Any]:
    a, b, out = _operands(session, size)
    timing = time_call(lambda: torch.mm(a, b, out=out), session.device, rounds=10, graph=False)
    return {"tflops": 2e-12 * size**3 / timing.median_s, **timing.record()}


def _sustained(session: Session, size: int) -> dict[str, Any]:
    seconds = 0.2 if session.tiny else max(1.0, min(20.0, session.seconds_left() - 5))
    return sustained_product(session.device, session.dtype, size, seconds)


def _copies(session: Session, megabytes: float) -> dict[str, Any]:
    count = max(1, int(megabytes * 2**20) // 2)
    rotate = buffers_for_cold(4 * count, session.device, most=32)
    make: dict[str, Any] = {"device": session.device, "dtype": session.dtype}
    pairs = [(torch.randn(count, **make), torch.empty(count, **make)) for _ in range(rotate)]
    variants = {
        "warm": [lambda: pairs[0][1].copy_(pairs[0][0])],
        "cold": [lambda s=source, t=target: t.copy_(s) for source, target in pairs],
    }
    timings = time_calls(variants, session.device, rounds=10, budget_s=0.5)
    facts: dict[str, Any] = {"rotated_buffers": rotate, "accounting": "bytes read + bytes written"}
    for name, timing in timings.items():
        facts[name] = {"tb_per_s": 4e-12 * count / timing.median_s, **timing.record()}
    return facts


def _fp8(session: Session, size: int) -> dict[str, Any]:
    """cuBLASLt row-wise scaled products, with and without fast accumulation (which does not accumulate in float32)."""
    a = torch.randn(size, size, device=session.device).to(torch.float8_e4m3fn)
    b = torch.randn(size, size, device=session.device).to(torch.float8_e4m3fn).t()
    rows = torch.ones(size, 1, device=session.device)
    columns = torch.ones(1, size, device=session.device)
    facts: dict[str, Any] = {}
    for fast in (True, False):
        timing = time_call(
            lambda fast=fast: torch._scaled_mm(
                a, b, scale_a=rows, scale_b=columns, out_dtype=session.dtype, use_fast_accum=fast
            ),
            session.device,
            rounds=10,
            graph=False,
        )
        facts[f"use_fast_accum={fast}"] = {"tflops": 2e-12 * size**3 / timing.median_s, **timing.record()}
    return facts
