"""`attention` for wide heads: matmul, softmax, matmul over chunks of queries, in plain torch operations.

No flash kernel fits a head dimension above 256 into registers (autoencoders attend with one head of 512), while two
matrix products run at the full rate of the library that torch calls. The scores of a chunk are float32 and bounded by
`workspace` bytes, whatever the image size; a chunk that stays in the L2 cache (50 MB on an H200) spares memory traffic.
"""

from __future__ import annotations

import torch

from ..op import Call
from .config import FLASH_HEAD_DIM

WORKSPACE = 64 << 20


def unsupported(call: Call) -> str | None:
    """Why a call is not for this implementation, or None."""
    if call.requires_grad:
        return "fused kernels are forward only, and an input requires a gradient"
    if call.tensors["q"].shape[-1] <= FLASH_HEAD_DIM:
        return f"it is for head dims above {FLASH_HEAD_DIM}, got {call.tensors['q'].shape[-1]}: flash kernels take it"
    return None


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_len: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """With the default workspace; arguments as the reference."""
    return chunked(q, k, v, kv_len, bias, scale, WORKSPACE)


def chunked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_len: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: float | None,
    workspace: int,
) -> torch.Tensor:
    """Arguments as the reference; any head dimension. workspace: bytes of scores and weights alive at a time.

    At least one query is taken at a time, so the smallest workspace is that of one query of every row and head.
    """
    rows, lq, heads, dim = q.shape
    if q.numel() == 0:
        return torch.empty_like(q, memory_format=torch.contiguous_format)
    lk = k.shape[1]
    factor = dim**-0.5 if scale is None else scale
    keys, values = (t.transpose(1, 2).reshape(rows * heads, lk, dim) for t in (k, v))
    keys = keys.transpose(1, 2)
    hidden = None
    if kv_len is not None:
        hidden = (torch.arange(lk, device=k.device) >= kv_len[:, None])[:, None, None]  # [B, 1, 1, Lk]
    spread = None if bias is None else bias.expand(rows, heads, lq, lk)
    step = max(1, workspace // max(1, rows * heads * lk * (8 + q.element_size())))  # scores, softmax, its cast
    done = []
    for start in range(0, lq, step):
        part = q[:, start : start + step].transpose(1, 2)
        scores = _scores(part.reshape(rows * heads, -1, dim), keys).unflatten(0, (rows, heads)).mul_(factor)
        if spread is not None:
            scores = scores.add_(spread[:, :, start : start + step])
        if hidden is not None:
            scores = scores.masked_fill_(hidden, float("-inf"))
        weights = torch.softmax(scores, -1).to(v.dtype)
        done.append(torch.bmm(weights.flatten(0, 1), values).unflatten(0, (rows, heads)).transpose(1, 2))
    return torch.cat(done, 1).contiguous()


def _scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """q k in float32, or float64 of float64: a product of halves keeps the float32 sums it makes."""
    if q.dtype in (torch.float32, torch.float64):
        return torch.bmm(q, k)
    if q.device.type == "cuda":
        return torch.bmm(q, k, out_dtype=torch.float32)
    return torch.bmm(q.float(), k.float())
