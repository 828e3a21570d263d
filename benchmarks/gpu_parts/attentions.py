"""The attentions of the models by every backend: cuDNN, flash, memory-efficient, xformers, and plain products.

torch's default on Hopper picks flash before cuDNN, so a comparison with "SDPA" must say which backend ran. Inputs are
views of [B, L, N, E] projections, as models have them; the prompt's 77 keys are included. A head of 512 (autoencoder)
is refused by the fused backends but the memory-efficient one; products with a softmax in between are its rival.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...kernels.timing import time_call
from .session import Session, relative_error
from .workloads import EXTRA_ATTENTION, MODELS, Attention, counted, flops

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
ROWS = (2, 16, 1)
SCORES_LIMIT = 2**31  # elements of one score matrix that plain products may allocate


def run(session: Session) -> None:
    for rows in ROWS[:1] if session.tiny else ROWS:
        for name, site in _sites(session.tiny):
            if name.startswith("vae") and rows > 1 and not session.tiny:
                continue
            key = f"{name} rows={rows} heads={site.heads} d={site.width} L={site.length} S={site.keys}"
            if not session.measure(key, lambda s=site, r=rows: _measure(session, s, r)):
                return


def _sites(tiny: bool) -> list[tuple[str, Attention]]:
    found: dict[Attention, str] = {}
    for model in ("tiny",) if tiny else MODELS:
        for site in sorted(counted(model, Attention, tiny=tiny)):
            assert isinstance(site, Attention)
            found.setdefault(site, model)
    if not tiny:
        found |= {site: name for name, site in EXTRA_ATTENTION.items()}
    return [(name, site) for site, name in found.items()]


def _measure(session: Session, site: Attention, rows: int) -> dict[str, Any]:
    def tensor(length: int) -> torch.Tensor:  # [B, L, N * E] seen as [B, N, L, E]
        flat = torch.randn(rows, length, site.heads * site.width, device=session.device, dtype=session.dtype)
        return flat.view(rows, length, site.heads, site.width).transpose(1, 2)

    q, k, v = tensor(site.length), tensor(site.keys), tensor(site.keys)
    part = slice(0, min(site.length, 256))
    truth = _products(q[:, :, part].float(), k.float(), v.float())
    calls: dict[str, Callable[[], torch.Tensor]] = {"default": lambda: F.scaled_dot_product_attention(q, k, v)}
    for name, backend in BACKENDS.items():
        if name == "math" and rows * site.heads * site.length * site.keys > SCORES_LIMIT:
            continue
        calls[name] = lambda b=backend: _with_backend(b, q, k, v)
    if rows * site.heads * site.length * site.keys <= SCORES_LIMIT:
        calls["products"] = lambda: _products(q, k, v)
    calls["xformers"] = lambda: _xformers(q, k, v)
    work, facts = flops(site, rows), {}
    for name, call in calls.items():
        try:
            error = relative_error(call()[:, :, part], truth)
            timing = time_call(call, session.device, rounds=10, budget_s=0.2, launches=10)
        except (RuntimeError, ImportError, NotImplementedError, ValueError) as refused:
            facts[name] = {"refused": str(refused).splitlines()[0][:200]}
            continue
        facts[name] = {
            "us": 1e6 * timing.median_s,
            "tflops": 1e-12 * work / timing.median_s,
            "error": error,
            **timing.record(),
        }
    return facts


def _with_backend(backend: SDPBackend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v)


def _products(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = (q @ k.transpose(-1, -2)).mul_(q.shape[-1] ** -0.5)
    return torch.softmax(scores, -1, dtype=torch.float32).to(v.dtype) @ v


def _xformers(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    from xformers.ops import memory_efficient_attention  # pyright: ignore[reportMissingImports]

    return memory_efficient_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
