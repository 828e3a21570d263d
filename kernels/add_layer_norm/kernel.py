"""Triton kernel of `add_layer_norm`: one program adds and normalises a few whole rows that it holds in registers.

Fused: the residual sum, its mean and variance, normalisation and affine part. Bytes moved: 2C read + 2C written per
row in the input's dtype (4 passes; the separate add and norm move 5), weights from cache; FLOPs about 9 a value; bound:
memory, or L2 and the launch at U-Net sizes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..launch import Compilation, launcher, triton_op
from ..launch_configs import launch_config
from ..moments import normalise_rows
from .config import Config, heuristic


@triton.jit
def add_layer_norm_kernel(
    x, residual, weight, bias, y, total, rows, columns, eps, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """x, residual, y, total: [rows, columns] contiguous; weight, bias: [columns] or None."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    inside = (m < rows)[:, None] & (n < columns)[None, :]
    at = m[:, None] * columns + n[None, :]
    v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    v += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    rounded = v.to(total.dtype.element_ty)  # what is normalised is what the next block reads
    tl.store(total + at, rounded, mask=inside)
    v = normalise_rows(rounded.to(tl.float32), inside, columns, eps)
    if weight is not None:
        v *= tl.load(weight + n, mask=n < columns, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        v += tl.load(bias + n, mask=n < columns, other=0.0).to(tl.float32)[None, :]
    tl.store(y + at, v.to(y.dtype.element_ty), mask=inside)


def launch(
    config: Config,
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the kernel under `config`; the other arguments as the reference."""
    x, residual = x.contiguous(), residual.contiguous()
    y, total = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    columns = x.shape[-1]
    rows = x.numel() // max(columns, 1)
    if rows:
        launcher(add_layer_norm_kernel)[(triton.cdiv(rows, config.block_m),)](
            x,
            residual,
            None if weight is None else weight.contiguous(),
            None if bias is None else bias.contiguous(),
            y,
            total,
            rows,
            columns,
            eps,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            **config.options.kwargs(),
        )
    return y, total


@triton_op("add_layer_norm")
def add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch with the configuration of the shape; arguments as the reference."""
    columns = x.shape[-1]
    config: Config = launch_config("add_layer_norm", heuristic, x.numel() // max(columns, 1), columns)
    return launch(config, x, residual, weight, bias, eps)


def compilations() -> list[Compilation]:
    """Every specialisation that launches on real shapes make."""
    shapes = [("bf16", 8192, 320), ("bf16", 2048, 640), ("bf16", 2048, 1280), ("bf16", 128, 1280), ("bf16", 8192, 768)]
    shapes += [
        ("bf16", 2048, 1536),
        ("fp16", 8192, 320),
        ("fp16", 2048, 1280),
        ("fp32", 8192, 320),
        ("fp32", 512, 1280),
    ]
    return [_compilation(dtype, rows, columns) for dtype, rows, columns in shapes]


def _compilation(dtype: str, rows: int, columns: int) -> Compilation:
    config = heuristic(rows, columns)
    pointers = ("x", "residual", "weight", "bias", "y", "total")
    return Compilation(
        name=f"{dtype}, {rows} x {columns}",
        kernel=add_layer_norm_kernel,
        signature={name: f"*{dtype}" for name in pointers} | {"rows": "i32", "columns": "i32", "eps": "fp32"},
        constants={"BLOCK_M": config.block_m, "BLOCK_N": config.block_n},
        options=config.options,
        divisible=frozenset({*pointers, "rows", "columns"}),
    )
