"""Launch configuration of `bias_residual_add`."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..launch import Options


@dataclass(frozen=True)
class Config:
    """Sites and channels of one tile; a program covers one run of sites, tile after tile. block_s divides 64."""

    block_s: int = 64
    block_c: int = 64
    options: Options = field(default_factory=lambda: Options(num_warps=8, num_stages=1))


def heuristic(rows: int, channels: int, sites: int) -> Config:
    """A configuration for a shape never timed: 4096 values a tile, narrower where programs would be too few."""
    block_c = min(64, 1 << max(channels - 1, 1).bit_length())
    return Config(block_c=block_c, options=Options(num_warps=max(1, block_c // 8), num_stages=1))


def search_space(rows: int, channels: int, sites: int) -> list[Config]:
    """What tuning tries."""
    return [
        Config(s, c, Options(num_warps=w, num_stages=1))
        for s in (16, 32, 64)
        for c in (32, 64, 128)
        for w in (2, 4, 8)
        if 256 * w <= s * c <= 1024 * w
    ]
