"""Launch configuration of `guidance_stats`."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..launch import Options


@dataclass(frozen=True)
class Config:
    """Programs that share a row, and elements of it that one program takes at a time."""

    splits: int = 1
    block: int = 256
    options: Options = field(default_factory=lambda: Options(num_warps=8, num_stages=1))


def heuristic(elements: int) -> Config:
    """A configuration for a row never timed: a power of two of programs, each with at least 1024 elements.

    So a latent is read in one or two waves of loads. It does not depend on the number of rows, so neither do the bits
    of a row.
    """
    return Config(splits=min(64, 1 << (max(elements // 1024, 1).bit_length() - 1)))


def search_space(elements: int) -> list[Config]:
    """What tuning tries."""
    return [
        Config(splits, block, Options(num_warps=warps, num_stages=1))
        for splits in (1, 2, 4, 8, 16, 32, 64, 128)
        for block, warps in ((256, 4), (256, 8), (512, 8), (1024, 16))
        if splits == 1 or splits * block <= elements
    ]
