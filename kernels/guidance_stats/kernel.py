"""Triton kernels of `guidance_stats`: one pass over the branches of a row, then a sum over the programs that shared it.

Fused: conversion to float32, all J (J + 1) / 2 inner products, J means. Bytes moved: the model output once (2 or 4 per
element and branch); FLOPs 2 (J + 1)^2 an element. Bound: the launch for latents of 1024 x 1024 pixels, memory for
video. A branch of ones is appended, whose inner products are the sums: one accumulator holds everything.

Sums are in a fixed order without atomics, so results repeat bit for bit and do not depend on other rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Compilation, launcher, triton_op
from ..launch_configs import launch_config
from .config import Config, heuristic


@triton.jit
def gram_kernel(
    model_output, out, means, elements, chunk, BRANCHES: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    LAST: tl.constexpr,
):  # fmt: skip
    """Program (s, r): elements from s * chunk of row r. `out` is [R, S, WIDTH, WIDTH], or the result if LAST."""
    split = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    j = tl.arange(0, WIDTH)
    source = model_output + (row * BRANCHES + j[:, None]) * elements
    begin = split * chunk
    end = tl.minimum(begin + chunk, elements)
    total = tl.zeros([WIDTH, WIDTH, BLOCK], tl.float32)
    for start in range(begin, end, BLOCK):
        e = start + tl.arange(0, BLOCK)
        inside = (e < end)[None, :]
        f = tl.load(source + e[None, :], mask=inside & (j < BRANCHES)[:, None], other=0.0).to(tl.float32)
        f = tl.where((j == BRANCHES)[:, None], 1.0, f)  # outside, every other branch is 0
        total += f[:, None, :] * f[None, :, :]
    gram = tl.sum(total, 2)
    if LAST:
        store_result(gram, out, means, row, elements, BRANCHES, WIDTH)
    else:
        at = (row * tl.num_programs(0) + split) * WIDTH * WIDTH + j[:, None] * WIDTH + j[None, :]
        tl.store(out + at, gram)


@triton.jit
def store_result(gram, out, means, row, elements, BRANCHES: tl.constexpr, WIDTH: tl.constexpr):
    i = tl.arange(0, WIDTH)[:, None]
    j = tl.arange(0, WIDTH)[None, :]
    tl.store(out + (row * BRANCHES + i) * BRANCHES + j, gram, mask=(i < BRANCHES) & (j < BRANCHES))
    tl.store(means + row * BRANCHES + i + j * 0, gram / elements, mask=(i < BRANCHES) & (j == BRANCHES))


@triton.jit
def finish_kernel(
    partial, out, means, elements, BRANCHES: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr
):  # fmt: skip
    """Program r: the sum of the partial matrices of row r."""
    row = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, SPLITS)[:, None, None]
    j = tl.arange(0, WIDTH)
    at = (row * SPLITS + s) * WIDTH * WIDTH + j[None, :, None] * WIDTH + j[None, None, :]
    store_result(tl.sum(tl.load(partial + at), 0), out, means, row, elements, BRANCHES, WIDTH)


@triton_op("guidance_stats")
def guidance_stats(model_output: Tensor) -> tuple[Tensor, Tensor]:
    """Launch with the configuration of the shape; arguments as the reference."""
    rows, branches = model_output.shape[:2]
    gram = torch.empty((rows, branches, branches), dtype=torch.float32, device=model_output.device)
    means = torch.empty((rows, branches), dtype=torch.float32, device=model_output.device)
    if rows == 0:
        return gram, means
    if not model_output.movedim(2, -1).is_contiguous():  # the sums do not depend on the order of C, H, W
        model_output = model_output.contiguous()
    elements = model_output[0, 0].numel()
    config: Config = launch_config("guidance_stats", heuristic, elements)
    width = matrix_width(branches)
    chunk = triton.cdiv(elements, config.splits)
    constants = {"BRANCHES": branches, "WIDTH": width}
    options = config.options.kwargs()
    if config.splits == 1:
        launcher(gram_kernel)[(1, rows)](
            model_output, gram, means, elements, chunk, **constants, BLOCK=config.block, LAST=True, **options
        )
        return gram, means
    partial = gram.new_empty((rows, config.splits, width, width))
    launcher(gram_kernel)[(config.splits, rows)](
        model_output, partial, means, elements, chunk, **constants, BLOCK=config.block, LAST=False, **options
    )
    launcher(finish_kernel)[(rows,)](partial, gram, means, elements, **constants, SPLITS=config.splits, **options)
    return gram, means


def matrix_width(branches: int) -> int:
    """Smallest power of two with room for the branches and the branch of ones."""
    return 1 << branches.bit_length()


def compilations() -> list[Compilation]:
    """Every specialisation that launches on real shapes make."""
    made = []
    for dtype, branches, latent in (("bf16", 2, 64), ("bf16", 2, 128), ("fp16", 3, 64), ("fp32", 2, 128)):
        elements = 4 * latent * latent
        config = heuristic(elements)
        name = f"{dtype}, {branches} branches, {latent} x {latent}"
        result = {"out": "*fp32", "means": "*fp32", "elements": "i32"}
        constants = {"BRANCHES": branches, "WIDTH": matrix_width(branches)}
        made.append(
            Compilation(
                name=name,
                kernel=gram_kernel,
                signature=result | {"model_output": f"*{dtype}", "chunk": "i32"},
                constants=constants | {"BLOCK": config.block, "LAST": config.splits == 1},
                options=config.options,
                divisible=frozenset({"model_output", "out", "means", "elements", "chunk"}),
            )
        )
        if config.splits > 1 and dtype != "bf16":
            made.append(
                Compilation(
                    name=f"finish, {branches} branches, {config.splits} splits",
                    kernel=finish_kernel,
                    signature=result | {"partial": "*fp32"},
                    constants=constants | {"SPLITS": config.splits},
                    options=config.options,
                    divisible=frozenset({"partial", "out", "means", "elements"}),
                )
            )
    return made
