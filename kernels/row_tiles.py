"""The Triton kernel of the layer norms, whose programs hold whole rows in registers, and its launch configurations.

`layer_norm` and `add_layer_norm` are one kernel: with a residual, it normalises the sum and stores that, too.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl

from .launch import Compilation, Options, launcher
from .moments import normalise_rows

MAX_COLUMNS = 16384
"""Widest row: 32 float32 values in each of 512 threads."""


@dataclass(frozen=True)
class Config:
    """Rows that one program holds, and the power of two at or above their length."""

    block_m: int = 1
    block_n: int = 2048
    options: Options = field(default_factory=lambda: Options(num_warps=4, num_stages=1))


def heuristic(rows: int, columns: int) -> Config:
    """A configuration for a shape never timed: 2048 values a program where there are rows enough, 16 a thread."""
    block_n = 1 << max(columns - 1, 1).bit_length()
    block_m = max(1, 2048 // block_n) if rows >= 1024 else 1
    warps = min(16, max(1, block_m * block_n // 512))
    return Config(block_m, block_n, Options(num_warps=warps, num_stages=1))


def search_space(rows: int, columns: int) -> list[Config]:
    """What tuning tries: up to 8192 values a program, 8 to 64 a thread."""
    block_n = 1 << max(columns - 1, 1).bit_length()
    return [
        Config(m, block_n, Options(num_warps=w, num_stages=1))
        for m in (1, 2, 4, 8)
        for w in (1, 2, 4, 8, 16)
        if m <= max(rows, 1) and (m == 1 or m * block_n <= 8192) and 256 * w <= m * block_n <= 2048 * w
    ] or [heuristic(rows, columns)]


@triton.jit
def rows_kernel(
    x, residual, weight, bias, y, total, rows, columns, eps, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """x, y: [rows, columns] contiguous; residual and total likewise, or both None; weight, bias: [columns] or None."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    inside = (m < rows)[:, None] & (n < columns)[None, :]
    at = m[:, None] * columns + n[None, :]
    v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        v += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        rounded = v.to(total.dtype.element_ty)  # what is normalised is what the next block reads
        tl.store(total + at, rounded, mask=inside)
        v = rounded.to(tl.float32)
    v = normalise_rows(v, inside, columns, eps)
    if weight is not None:
        v *= tl.load(weight + n, mask=n < columns, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        v += tl.load(bias + n, mask=n < columns, other=0.0).to(tl.float32)[None, :]
    tl.store(y + at, v.to(y.dtype.element_ty), mask=inside)


def run(
    config: Config,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The normalised rows of x + residual and, with a residual, that sum; x, residual: [..., C] of one dtype."""
    inputs = [None if t is None else t.contiguous() for t in (x, residual, weight, bias)]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = None if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, columns = sizes(x).values()
    if rows:
        grid = (triton.cdiv(rows, config.block_m),)
        blocks = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
        launcher(rows_kernel)[grid](*inputs, y, total, rows, columns, eps, **blocks, **config.options.kwargs())
    return y, total


def sizes(x: torch.Tensor) -> dict[str, int]:
    """What the configuration depends on."""
    return {"rows": x.numel() // max(x.shape[-1], 1), "columns": x.shape[-1]}


SHAPES = (
    *[("bf16", *size) for size in ((8192, 320), (2048, 640), (2048, 1280), (128, 1280), (8192, 768), (2048, 1536))],
    *[("fp16", *size) for size in ((8192, 320), (2048, 1280))],
    *[("fp32", *size) for size in ((8192, 320), (512, 1280))],
)


def compilations(residual: bool) -> list[Compilation]:
    """Every specialisation that launches on real shapes make, with or without a residual."""
    pointers = ("x", "residual", "weight", "bias", "y", "total") if residual else ("x", "weight", "bias", "y")
    made = []
    for dtype, rows, columns in SHAPES:
        config = heuristic(rows, columns)
        made.append(
            Compilation(
                name=f"{dtype}, {rows} x {columns}",
                kernel=rows_kernel,
                signature={p: f"*{dtype}" for p in pointers} | {"rows": "i32", "columns": "i32", "eps": "fp32"},
                constants={"BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
                | ({} if residual else {"residual": None, "total": None}),
                options=config.options,
                divisible=frozenset({*pointers, "rows", "columns"}),
            )
        )
    return made
