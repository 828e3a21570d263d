"""Launch configuration of `attention`'s Triton kernel: tiles, and the cut of a head dimension into powers of two."""

from __future__ import annotations

from dataclasses import dataclass

from ..launch import Options

MAX_HEAD_DIM = 192  # of the Triton kernel: above, accumulators do not fit in registers
FLASH_HEAD_DIM = 256  # the widest head that any flash kernel takes
CHIP = 100  # tiles below which a GPU has idle multiprocessors (108 on A100, 132 on H200)
CDNA = 94  # what torch reports as the compute capability of gfx942


@dataclass(frozen=True)
class Config:
    """Queries that a program owns, keys it takes at a time, compiler options."""

    block_m: int
    block_n: int
    options: Options


def parts(head_dim: int) -> tuple[int, int, int]:
    """Cut a head dimension into at most three powers of two >= 16 (0 = no part); their sum may exceed it.

    80 = 64 + 16 costs 80 columns of tensor-core work and accumulators, where padding to a power of two costs 128.
    Raises ValueError for a head dimension that the kernel does not take.
    """
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"head dim {head_dim}: the Triton kernel takes 1 to {MAX_HEAD_DIM}; use 'auto' or 'chunked'")
    columns = -(-head_dim // 16) * 16
    found = [power for power in (128, 64, 32, 16) if columns & power]
    first, second, third = (*found, 0, 0)[:3]  # a fourth would begin at 240
    return first, second, third


def _tile(sm: int, columns: int, bits: int, small: bool, biased: bool) -> tuple[int, int, int, int]:
    """block_m, block_n, warps, stages: the largest tile that the compiler fits without spills, float32 excepted."""
    if bits == 32:  # IEEE multiply-adds without tensor cores keep whole rows in registers; above 80 columns they spill
        return 16, 16, 8, 1
    if sm == CDNA:
        if small or biased or columns > 128:
            return 64, 32, 4, 1
        return 128, 64 if columns <= 80 else 32, 4, 1
    if sm < 90 or sm >= 120:  # mma.sync: the queries live in registers too
        if biased:
            return 128 if columns <= 80 else 64, 16, 8, 3
        if small:
            return (64, 64, 4, 3) if columns <= 64 else (64, 32, 4, 3) if columns <= 80 else (64, 16, 8, 3)
        return 128, 64 if columns <= 80 else 32 if columns <= 128 else 16, 8, 3
    if biased:  # one address a score
        return (128, 64, 8, 2) if columns <= 80 else (64, 32, 4, 2)
    if sm >= 100:  # tensor memory holds 512 columns of scores and outputs
        if small or columns > 80:
            return 64, 64 if columns <= 160 else 32, 4, 2
        return 128, 128, 8, 2
    if small:
        return 64, 64 if columns <= 128 else 32, 4, 3
    return 128, 128 if columns <= 128 else 64, 8, 3 if columns <= 80 else 2


def heuristic(head_dim: int, queries: int, heads: int, bits: int, sm: int, biased: bool = False) -> Config:
    """A configuration for a shape never timed.

    queries: Lq; heads: heads of all rows together; bits: of the dtype; sm: compute capability (90), 0 without a GPU,
    which takes Hopper's; biased: whether there is an additive bias.
    """
    small = queries <= 64 or -(-queries // 128) * heads < CHIP
    block_m, block_n, warps, stages = _tile(sm or 90, sum(parts(head_dim)), bits, small, biased)
    return Config(block_m, block_n, Options(num_warps=warps, num_stages=stages))


def search_space(head_dim: int, queries: int, bits: int) -> list[Config]:
    """What tuning tries; a tile that does not fit a GPU's shared memory fails to launch there and is skipped."""
    columns = sum(parts(head_dim))
    return [
        Config(m, n, Options(num_warps=warps, num_stages=stages))
        for m, warps in ((128, 8), (128, 4), (64, 4), (64, 8))
        for n in (16, 32, 64, 128)
        for stages in (1, 2, 3, 4)
        if (m == 64 or queries > 64) and n * columns * stages * bits // 8 <= 113 * 1024
    ]
