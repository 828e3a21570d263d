"""Triton kernel of `geglu`: a * gelu(b), one program per tile of rows and columns.

Fused: the chunk, the exact GELU and the product. Bytes moved: 2C read + C written per row, in the input's dtype (3
passes of the output size); FLOPs about 20 a value (erf); bound: memory, or L2 where the projection has just been
written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..launch import Compilation, Options, launcher, triton_op
from ..launch_configs import launch_config
from .config import Config, heuristic


@triton.jit
def geglu_kernel(x, y, rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """x: [rows, 2 * columns] contiguous, y: [rows, columns] contiguous."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (m < rows)[:, None] & (n < columns)[None, :]
    source = x + m[:, None] * (2 * columns) + n[None, :]
    a = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(source + columns, mask=inside, other=0.0).to(tl.float32)
    gelu = 0.5 * b * (1.0 + tl.erf(b * 0.7071067811865476))
    tl.store(y + m[:, None] * columns + n[None, :], (a * gelu).to(y.dtype.element_ty), mask=inside)


@triton_op("geglu")
def geglu(x: torch.Tensor) -> torch.Tensor:
    """Launch with the configuration of the shape; arguments as the reference."""
    x = x.contiguous()
    columns = x.shape[-1] // 2
    y = torch.empty((*x.shape[:-1], columns), dtype=x.dtype, device=x.device)
    rows = y.numel() // columns
    config: Config = launch_config("geglu", heuristic, rows, columns)
    grid = (triton.cdiv(rows, config.block_m), triton.cdiv(columns, config.block_n))
    if rows:
        options = config.options.kwargs()
        launcher(geglu_kernel)[grid](x, y, rows, columns, BLOCK_M=config.block_m, BLOCK_N=config.block_n, **options)
    return y


def compilations() -> list[Compilation]:
    """Every specialisation that launches on real shapes make."""
    made = []
    for dtype in ("bf16", "fp16", "fp32"):
        for rows, columns in ((8192, 1280), (2048, 5120), (128, 640)):
            config: Config = heuristic(rows, columns)
            made.append(
                Compilation(
                    name=f"{dtype}, {rows} x {columns}",
                    kernel=geglu_kernel,
                    signature={"x": f"*{dtype}", "y": f"*{dtype}", "rows": "i32", "columns": "i32"},
                    constants={"BLOCK_M": config.block_m, "BLOCK_N": config.block_n},
                    options=Options(**config.options.kwargs()),
                    divisible=frozenset({"x", "y", "rows", "columns"}),
                )
            )
    return made
