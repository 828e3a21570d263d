"""Roofs, measured: a matrix product held for seconds, and a copy of as many bytes as a kernel moves."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from .harness import ClockLog


def sustained_product(device: torch.device, dtype: torch.dtype, size: int, seconds: float) -> dict[str, Any]:
    """TFLOP/s of [size, size] @ [size, size], one after the other for `seconds`: the roof of a long run.

    Ten products in a burst run at clocks that twenty seconds do not hold; the clock log is part of the record.
    """
    make: dict[str, Any] = {"device": device, "dtype": dtype}
    a, b, out = torch.randn(size, size, **make), torch.randn(size, size, **make), torch.empty(size, size, **make)
    products, start = 0, time.perf_counter()
    with ClockLog() as clocks:
        while time.perf_counter() - start < seconds:
            for _ in range(20):
                torch.mm(a, b, out=out)
            products += 20
            if device.type == "cuda":
                torch.cuda.synchronize()
        elapsed = time.perf_counter() - start
    return {"tflops": 2e-12 * size**3 * products / elapsed, "seconds": elapsed, "clocks": clocks.summary()}


def copies(nbytes: int, rotate: int, device: torch.device) -> list[Callable[[], object]]:
    """Copies that read and write `nbytes` together, between `rotate` pairs of buffers."""
    make: dict[str, Any] = {"device": device, "dtype": torch.uint8}
    half = max(1, nbytes // 2)
    pairs = [(torch.zeros(half, **make), torch.empty(half, **make)) for _ in range(rotate)]
    return [lambda source=source, target=target: target.copy_(source) for source, target in pairs]
