"""A few seconds of known work before every part: does this run compare with another, and how far apart are equals?

A copy, a matrix product and an attention: where two runs disagree on them by more than 1 %, their other numbers must
not be subtracted. The product is timed twice as two variants of the same thing (A/A); what differs by less than twice
their spread is equal.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ...kernels.timing import time_calls
from .session import Session


def measure(session: Session) -> dict[str, Any]:
    """TB/s of the copy, TFLOP/s of product and attention, and the relative A/A spread."""
    size, tokens, count = (64, 32, 1 << 12) if session.tiny or not session.cuda else (4096, 4096, 1 << 27)
    make: dict[str, Any] = {"device": session.device, "dtype": session.dtype}
    a, b, out = torch.randn(size, size, **make), torch.randn(size, size, **make), torch.empty(size, size, **make)
    source, target = torch.randn(count, **make), torch.empty(count, **make)
    q, k, v = (torch.randn(2, 10, tokens, 64, **make) for _ in range(3))
    variants = {
        "product": [lambda: torch.mm(a, b, out=out)],
        "product again": [lambda: torch.mm(a, b, out=out)],
        "copy": [lambda: target.copy_(source)],
        "attention": [lambda: F.scaled_dot_product_attention(q, k, v)],
    }
    timings = time_calls(variants, session.device, rounds=10, launches=5, budget_s=1.0)
    first, second = timings["product"].median_s, timings["product again"].median_s
    return {
        "product_tflops": 2e-12 * size**3 / first,
        "copy_tb_per_s": 4e-12 * count / timings["copy"].median_s,
        "attention_tflops": 4e-12 * 20 * tokens**2 * 64 / timings["attention"].median_s,
        "a_a_spread": abs(first - second) / min(first, second),
    }
