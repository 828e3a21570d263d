"""Launch configurations of kernels whose programs hold whole rows in registers (the layer norms)."""

from __future__ import annotations

from dataclasses import dataclass, field

from .launch import Options

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
