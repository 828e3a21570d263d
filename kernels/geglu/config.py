"""Launch configuration of `geglu`."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..launch import Options


@dataclass(frozen=True)
class Config:
    """Rows and columns of the output that one program writes."""

    block_m: int = 4
    block_n: int = 512
    options: Options = field(default_factory=lambda: Options(num_warps=8, num_stages=1))


def heuristic(rows: int, columns: int) -> Config:
    """A configuration for a shape never timed: whole wide tiles, fewer rows a program where there are few rows."""
    block_n = min(512, 1 << max(columns - 1, 1).bit_length())
    return Config(block_m=4 if rows >= 1024 else 1, block_n=block_n)


def search_space(rows: int, columns: int) -> list[Config]:
    """What tuning tries."""
    return [
        Config(m, n, Options(num_warps=w, num_stages=1))
        for m in (1, 2, 4, 8)
        for n in (256, 512, 1024)
        for w in (4, 8)
        if m * n <= 4096
    ]
