"""Every distinct matrix product of the models, at several row counts, by every way torch offers to compute it.

Variants: `mm`; `bias` (addmm); `residual` (in-place addmm_, which saves one pass); `qkv` (three projections in one
product); `gelu` (cuBLASLt's fused bias and tanh-GELU). Each shape first passes a probe: ones times ones must give K
exactly, because some cuBLASLt split-K kernels have dropped the tail of K.
"""

from __future__ import annotations

from typing import Any

import torch

from ...kernels.timing import time_calls
from .session import Session
from .workloads import MODELS, Gemm, counted, flops

ROWS = (2, 16, 1, 8, 4, 32)  # most telling first: one picture with guidance, then a full batch


def run(session: Session) -> None:
    for rows in ROWS[:1] if session.tiny else ROWS:
        for model in ("tiny",) if session.tiny else MODELS:
            for site, count in sorted(counted(model, Gemm, tiny=session.tiny).items()):
                assert isinstance(site, Gemm)
                key = f"{model} rows={rows} m={site.m}{'/row' if site.per_row else ''} n={site.n} k={site.k}"
                if not session.measure(key, lambda s=site, r=rows, c=count: _measure(session, s, r, c)):
                    return


def _measure(session: Session, site: Gemm, rows: int, count: int) -> dict[str, Any]:
    m, n, k = site.m * rows, site.n, site.k
    make = {"device": session.device, "dtype": session.dtype}
    ones = torch.ones(m, k, **make) @ torch.ones(n, k, **make).t()
    exact = bool((ones == k).all())
    del ones
    x, weight, bias = torch.randn(m, k, **make), torch.randn(n, k, **make), torch.randn(n, **make)
    transposed = weight.t()
    out, residual = torch.empty(m, n, **make), torch.randn(m, n, **make)
    variants = {
        "mm": [lambda: torch.mm(x, transposed, out=out)],
        "bias": [lambda: torch.addmm(bias, x, transposed, out=out)],
        "residual": [lambda: residual.addmm_(x, transposed)],
    }
    if n == k and site.per_row:
        triple = torch.randn(3 * n, k, **make).t()
        wide = torch.empty(m, 3 * n, **make)
        variants["qkv"] = [lambda: torch.mm(x, triple, out=wide)]
    if n == 4 * k:
        variants["gelu"] = [lambda: torch._addmm_activation(bias, x, transposed, use_gelu=True)]
    timings = time_calls(variants, session.device, rounds=10, budget_s=0.2)
    work = flops(site, rows)
    facts: dict[str, Any] = {"m": m, "n": n, "k": k, "count": count, "probe_exact": exact}
    for name, timing in timings.items():
        scale = 3 if name == "qkv" else 1
        facts[name] = {"us": 1e6 * timing.median_s, "tflops": 1e-12 * scale * work / timing.median_s, **timing.record()}
    return facts
