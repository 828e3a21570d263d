"""Triton kernel of `bias_residual_add`: one program per run of sites and block of channels.

Fused: the two additions and the statistics of the next group norm. Bytes moved: 2 tensors read + 1 written in the
input's dtype (3 passes), plus 8 bytes per channel and run of at least 64 sites; FLOPs about 8 a value; bound: memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..launch import Compilation, launcher, triton_op
from ..launch_configs import launch_config
from ..moments import merge_lanes, tile_offsets, tile_start, welford
from ..op import is_channels_last
from ..statistics import run_count, sites_per_run
from .config import Config, heuristic


@triton.jit
def bias_residual_add_kernel(
    x,
    bias,
    residual,
    y,
    stats,
    sites,
    channels,
    run,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """x, residual, y: [B, channels, sites] of one layout; stats: [B, runs, 2, channels]; grid: runs, blocks, B."""
    b = tl.program_id(2).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * run
    length = tl.minimum(run, sites - first).to(tl.int32)
    c0 = tl.program_id(1) * BLOCK_C
    c = tl.arange(0, BLOCK_C)
    s = tl.arange(0, BLOCK_S)
    at = tile_offsets(s[:, None], c[None, :], sites, channels, CHANNELS_LAST)
    known = c0 + c < channels
    added = tl.zeros([BLOCK_C], tl.float32)
    if bias is not None:
        added = tl.load(bias + c0 + c, mask=known, other=0.0).to(tl.float32)
    mean = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    for done in range(0, length, BLOCK_S):
        inside = (done + s < length)[:, None] & known[None, :]
        start = tile_start(b, first + done, c0, sites, channels, CHANNELS_LAST)
        v = tl.load(x + start + at, mask=inside, other=0.0).to(tl.float32) + added[None, :]
        v += tl.load(residual + start + at, mask=inside, other=0.0).to(tl.float32)
        rounded = v.to(y.dtype.element_ty)  # the statistics are those of what the next op reads
        tl.store(y + start + at, rounded, mask=inside)
        mean, squares = welford(mean, squares, rounded.to(tl.float32), inside, (done // BLOCK_S + 1) * 1.0)
    centre, total = merge_lanes(mean, squares, length, BLOCK_S)
    out = stats + (b * tl.num_programs(0) + tl.program_id(0)) * 2 * channels + c0 + c
    tl.store(out, centre, mask=known)
    tl.store(out + channels, total, mask=known)


def launch(
    config: Config, x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the kernel under `config`; the other arguments as the reference."""
    channels_last = is_channels_last(x)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x, residual = x.contiguous(memory_format=layout), residual.contiguous(memory_format=layout)
    rows, channels, sites = x.shape[0], x.shape[1], x.shape[2:].numel()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout)
    stats = torch.empty((rows, run_count(sites), 2, channels), dtype=torch.float32, device=x.device)
    if rows:
        launcher(bias_residual_add_kernel)[(run_count(sites), triton.cdiv(channels, config.block_c), rows)](
            x,
            None if bias is None else bias.contiguous(),
            residual,
            y,
            stats,
            sites,
            channels,
            sites_per_run(sites),
            CHANNELS_LAST=channels_last,
            BLOCK_S=config.block_s,
            BLOCK_C=config.block_c,
            **config.options.kwargs(),
        )
    return y, stats


@triton_op("bias_residual_add")
def bias_residual_add(
    x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch with the configuration of the shape; arguments as the reference."""
    sizes = x.shape[0], x.shape[1], x.shape[2:].numel()
    config: Config = launch_config("bias_residual_add", heuristic, *sizes)
    return launch(config, x, bias, residual)


def compilations() -> list[Compilation]:
    """Every specialisation that launches on real shapes make."""
    return [
        _compilation(dtype, channels_last, bias)
        for dtype in ("bf16", "fp16", "fp32")
        for channels_last in (True, False)
        for bias in (True, False)
    ]


def _compilation(dtype: str, channels_last: bool, bias: bool) -> Compilation:
    config = heuristic(2, 320, 4096)
    pointers = ("x", "bias", "residual", "y") if bias else ("x", "residual", "y")
    integers = ("sites", "channels", "run")
    return Compilation(
        name=f"{dtype}, {'channels-last' if channels_last else 'contiguous'}, {'bias' if bias else 'no bias'}",
        kernel=bias_residual_add_kernel,
        signature={p: f"*{dtype}" for p in pointers} | {"stats": "*fp32"} | dict.fromkeys(integers, "i32"),
        constants={"CHANNELS_LAST": channels_last, "BLOCK_S": config.block_s, "BLOCK_C": config.block_c}
        | ({} if bias else {"bias": None}),
        options=config.options,
        divisible=frozenset({*pointers, "stats", *integers}),
    )
