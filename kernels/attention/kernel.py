"""Triton kernel of `attention`: softmax(q k^T * scale + bias) v without the score matrix in memory.

Fused: both products, scale, bias, key lengths and an online softmax in base 2 (Milakov & Gimelshein 2018; Dao 2023).
One program owns a tile of queries of one head and walks over the keys. Head dimensions that are no power of two are cut
into up to three parts (80 = 64 + 16) instead of being padded (80 -> 128). Bytes moved: q, k, v read and y written once,
k and v again from L2 for every tile of queries; FLOPs 4 Lq Lk D per head and row; bound: tensor cores, with the
exponentials (one a score) about as expensive as the products at D = 64 and below.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..device import sm
from ..launch import Compilation, launcher, needs_cuda, triton_op
from ..launch_configs import launch_config
from ..op import Call
from .config import CDNA, MAX_HEAD_DIM, Config, heuristic, parts

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load(source, row, stride, inside, FIRST: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr, TAIL: tl.constexpr):
    """Columns [FIRST, FIRST + WIDTH) of rows; columns from DIM on, and rows outside in a tail, are zero."""
    d = FIRST + tl.arange(0, WIDTH)
    at = source + row[:, None] * stride + d[None, :]
    if FIRST + WIDTH > DIM:
        if TAIL:
            return tl.load(at, mask=inside[:, None] & (d < DIM)[None, :], other=0.0)
        return tl.load(at, mask=(d < DIM)[None, :], other=0.0)
    if TAIL:
        return tl.load(at, mask=inside[:, None], other=0.0)
    return tl.load(at)


@triton.jit
def _block(
    acc0, acc1, acc2, total, peak, q0, q1, q2, k, v, k_stride, v_stride, start, length, scale2,
    bias, bias_m, bias_n, row_q, queries,
    D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, DIM: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Take keys [start, start + BLOCK_N) into the running sums; in a TAIL, keys from `length` on do not exist."""
    n = tl.arange(0, BLOCK_N)
    inside = n < length - start
    k += start * k_stride
    v += start * v_stride
    s = tl.dot(q0, _load(k, n, k_stride, inside, 0, D0, DIM, TAIL).T, input_precision="ieee")
    if D1 > 0:
        s = tl.dot(q1, _load(k, n, k_stride, inside, D0, D1, DIM, TAIL).T, s, input_precision="ieee")
    if D2 > 0:
        s = tl.dot(q2, _load(k, n, k_stride, inside, D0 + D1, D2, DIM, TAIL).T, s, input_precision="ieee")

    if bias is None:
        if TAIL:
            s = tl.where(inside[None, :], s, float("-inf"))
        top = tl.maximum(peak, tl.max(s, 1) * scale2)
        p = tl.exp2(s * scale2 - top[:, None])
        shrink = tl.exp2(peak - top)
    else:
        # 32-bit offsets inside the tile: 64-bit ones for every score would not fit in registers.
        at = bias + start * bias_n + (row_q * bias_m)[:, None] + (n * bias_n)[None, :]
        seen = (row_q < queries)[:, None] & inside[None, :]
        s = s * scale2 + tl.load(at, mask=seen, other=0.0).to(tl.float32) * LOG2E
        if TAIL:
            s = tl.where(inside[None, :], s, float("-inf"))
        top = tl.maximum(peak, tl.max(s, 1))
        origin = tl.where(top == float("-inf"), 0.0, top)  # a bias of -inf may hide every key so far
        p = tl.exp2(s - origin[:, None])
        shrink = tl.exp2(peak - origin)
    total = total * shrink + tl.sum(p, 1)
    p = p.to(v.dtype.element_ty)
    acc0 = tl.dot(p, _load(v, n, v_stride, inside, 0, D0, DIM, TAIL), acc0 * shrink[:, None], input_precision="ieee")
    if D1 > 0:
        v1 = _load(v, n, v_stride, inside, D0, D1, DIM, TAIL)
        acc1 = tl.dot(p, v1, acc1 * shrink[:, None], input_precision="ieee")
    if D2 > 0:
        v2 = _load(v, n, v_stride, inside, D0 + D1, D2, DIM, TAIL)
        acc2 = tl.dot(p, v2, acc2 * shrink[:, None], input_precision="ieee")
    return acc0, acc1, acc2, total, top


@triton.jit
def _store(y, acc, m, stride, lq, FIRST: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr):
    d = FIRST + tl.arange(0, WIDTH)
    inside = (m < lq)[:, None] & (d < DIM)[None, :]
    tl.store(y + m[:, None] * stride + d[None, :], acc.to(y.dtype.element_ty), mask=inside)


INTEGERS = ["qb", "ql", "qh", "kb", "kl", "kh", "vb", "vl", "vh", "bb", "bh", "bm", "lq", "lk", "heads"]


@triton.jit(do_not_specialize=INTEGERS)
def attention_kernel(
    q, k, v, y, kv_len, bias, scale2, qb, ql, qh, kb, kl, kh, vb, vl, vh, bb, bh, bm, bn, lq, lk, heads,
    UNIT: tl.constexpr, DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """q [B, lq, heads, DIM], k, v [B, lk, heads, DIM] with strides of UNIT elements; y contiguous; bias may be None.

    scale2: scale * log2(e), > 0. kv_len: int32 [B] or None. The strides are not specialised, so that UNIT alone says
    how many elements one load may take: 40 (a head's stride) is a multiple of 8, which Triton would not find out.
    """
    tiles = tl.cdiv(lq, BLOCK_M)
    tile = tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles
    b = (head // heads).to(tl.int64)
    h = (head % heads).to(tl.int64)
    first = tile * BLOCK_M
    row_q = tl.arange(0, BLOCK_M)
    m = first.to(tl.int64) + row_q
    q += (b * qb + h * qh) * UNIT
    k += (b * kb + h * kh) * UNIT
    v += (b * vb + h * vh) * UNIT
    if bias is not None:
        bias += b * bb + h * bh + first.to(tl.int64) * bm
    length = lk
    if kv_len is not None:
        length = tl.minimum(tl.maximum(tl.load(kv_len + b), 0), lk)

    q_stride = ql.to(tl.int64) * UNIT
    k_stride = kl.to(tl.int64) * UNIT
    v_stride = vl.to(tl.int64) * UNIT
    q0 = _load(q, m, q_stride, m < lq, 0, D0, DIM, True)
    q1 = q0
    q2 = q0
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    acc0 = tl.zeros([BLOCK_M, D0], tl.float32)
    acc1 = total  # stands for nothing where there is no such part
    acc2 = total
    if D1 > 0:
        q1 = _load(q, m, q_stride, m < lq, D0, D1, DIM, True)
        acc1 = tl.zeros([BLOCK_M, D1], tl.float32)
    if D2 > 0:
        q2 = _load(q, m, q_stride, m < lq, D0 + D1, D2, DIM, True)
        acc2 = tl.zeros([BLOCK_M, D2], tl.float32)

    full = length // BLOCK_N * BLOCK_N
    for start in tl.range(0, full, BLOCK_N):
        acc0, acc1, acc2, total, peak = _block(
            acc0, acc1, acc2, total, peak, q0, q1, q2, k, v, k_stride, v_stride, start, length, scale2,
            bias, bm, bn, row_q, lq - first, D0, D1, D2, DIM, BLOCK_N, False,
        )  # fmt: skip
    if full < length:
        acc0, acc1, acc2, total, peak = _block(
            acc0, acc1, acc2, total, peak, q0, q1, q2, k, v, k_stride, v_stride, full, length, scale2,
            bias, bm, bn, row_q, lq - first, D0, D1, D2, DIM, BLOCK_N, True,
        )  # fmt: skip

    inverse = 1.0 / tl.where(total == 0.0, 1.0, total)[:, None]  # no key at all: zeros
    y += (b * lq * heads + h) * DIM
    _store(y, acc0 * inverse, m, heads * DIM, lq, 0, D0, DIM)
    if D1 > 0:
        _store(y, acc1 * inverse, m, heads * DIM, lq, D0, D1, DIM)
    if D2 > 0:
        _store(y, acc2 * inverse, m, heads * DIM, lq, D0 + D1, D2, DIM)


def run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_len: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: float | None,
    config: Config,
) -> torch.Tensor:
    """Launch with a given configuration; arguments as the reference. Copies only where the last stride is not 1."""
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    rows, lq, heads, dim = q.shape
    lk = k.shape[1]
    y = torch.empty((rows, lq, heads, dim), dtype=q.dtype, device=q.device)
    if y.numel() == 0:
        return y
    wide = 16 // q.element_size()
    strides = [0 if n == 1 else s for t in (q, k, v) for n, s in zip(t.shape[:3], t.stride()[:3], strict=True)]
    unit = wide if all(s % wide == 0 for s in strides) else 1
    spread = None if bias is None else bias.expand(rows, heads, lq, lk)
    if bias is not None and spread is not None and (spread.stride(3) > 1 or spread.stride(2) >= 1 << 24):
        spread = bias.contiguous().expand(rows, heads, lq, lk)  # offsets inside a tile are 32-bit
    launcher(attention_kernel)[(triton.cdiv(lq, config.block_m) * rows * heads,)](
        q,
        k,
        v,
        y,
        None if kv_len is None else kv_len.contiguous(),
        spread,
        (dim**-0.5 if scale is None else scale) * LOG2E.value,
        *(s // unit for s in strides),
        *((0, 0, 0, 0) if spread is None else spread.stride()),
        lq,
        lk,
        heads,
        UNIT=unit,
        DIM=dim,
        **_cut(dim),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        **config.options.kwargs(),
    )
    return y


def _cut(dim: int) -> dict[str, int]:
    return dict(zip(("D0", "D1", "D2"), parts(dim), strict=True))


@triton_op("attention")
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_len: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Launch with the configuration of the shape; arguments as the reference, scale > 0."""
    sizes = {"head_dim": q.shape[3], "queries": q.shape[1], "heads": q.shape[0] * q.shape[2]}
    target = {"bits": 8 * q.element_size(), "sm": sm(), "biased": bias is not None}
    config: Config = launch_config("attention", heuristic, **sizes, **target)
    return run(q, k, v, kv_len, bias, scale, config)


def unsupported(call: Call) -> str | None:
    """Why the Triton kernel cannot run a call, or None."""
    if reason := needs_cuda(call):
        return reason
    dim, scale = call.tensors["q"].shape[-1], call.options.get("scale")
    if not 1 <= dim <= MAX_HEAD_DIM:
        return f"head dims are 1 to {MAX_HEAD_DIM}, got {dim}"
    if 0 < sm() < 80:
        return f"it needs compute capability 8.0, the device has {sm() / 10}"
    if scale is not None and scale <= 0:
        return f"the maximum of the scores is scaled after it is taken, so the scale must be positive, got {scale}"
    return None


TARGETS = {"sm_80": 80, "sm_86": 86, "sm_89": 89, "sm_90": 90, "sm_100": 100, "sm_120": 120, "gfx942": CDNA}
HEAD_DIMS = (40, 64, 72, 80, 112, 128, 160)


def compilations() -> list[Compilation]:
    """Every specialisation that launches on real shapes make: integers are not specialised, so lengths add none."""
    plain = [("bf16", dim, queries, frozenset[str]()) for dim in HEAD_DIMS for queries in (4096, 64)]
    padded = [("bf16", dim, 4096, frozenset({"kv_len"})) for dim in (40, 64, 80, 160)]
    biased = [("bf16", dim, 4096, frozenset({"bias"})) for dim in (64, 80, 160)]
    halves = [("fp16", dim, 4096, frozenset[str]()) for dim in (40, 64, 80, 160)]
    singles = [("fp32", dim, 4096, frozenset({"kv_len"})) for dim in (40, 64, 160)]
    made: dict[tuple[object, ...], set[str]] = {}
    for dtype, dim, queries, extra in plain + padded + biased + halves + singles:
        for target, number in TARGETS.items():
            config = heuristic(dim, queries, 16, 32 if dtype == "fp32" else 16, number, "bias" in extra)
            made.setdefault((dtype, dim, extra, config), set()).add(target)
    return [_compilation(*key, targets=frozenset(targets)) for key, targets in made.items()]  # type: ignore[arg-type]


def _compilation(dtype: str, dim: int, extra: frozenset[str], config: Config, targets: frozenset[str]) -> Compilation:
    pointers = {name: f"*{dtype}" for name in ("q", "k", "v", "y")}
    pointers |= {name: {"kv_len": "*i32", "bias": f"*{dtype}"}[name] for name in extra}
    constants: dict[str, Any] = dict.fromkeys({"kv_len", "bias"} - extra)
    integers = dict.fromkeys([*INTEGERS, "bn"], "i32")
    if "bias" in extra:  # its last stride, the one integer that is specialised, is 1
        constants["bn"] = 1
        del integers["bn"]
    constants |= {"UNIT": 4 if dtype == "fp32" else 8, "DIM": dim, **_cut(dim)}
    constants |= {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
    tile = f"{config.block_m} x {config.block_n}, {config.options.num_warps} warps, {config.options.num_stages} stages"
    return Compilation(
        name=", ".join([dtype, f"head dim {dim}", tile, *sorted(extra)]),
        kernel=attention_kernel,
        signature={**pointers, "scale2": "fp32", **integers},
        constants=constants,
        options=config.options,
        divisible=frozenset({*pointers, *({"bn"} & set(integers))}),  # no bias: bn is 0
        targets=targets,
    )
