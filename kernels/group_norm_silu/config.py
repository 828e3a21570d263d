"""Launch configuration of `group_norm_silu`."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..launch import Options

ON_CHIP = 32768
"""Most values of a 2-byte dtype that a program holds (as float32) in registers: 64 in each of 512 threads."""


@dataclass(frozen=True)
class OnePass:
    """A program holds `group_set` (a power of two) whole groups of one row in registers."""

    group_set: int = 1
    options: Options = field(default_factory=lambda: Options(num_warps=8, num_stages=1))


@dataclass(frozen=True)
class TwoPass:
    """Tiles of block_s sites (a divisor of 64) x block_c channels, in the statistics and the normalising kernel."""

    block_s: int = 64
    block_c: int = 64
    options: Options = field(default_factory=lambda: Options(num_warps=8, num_stages=1))


Config = OnePass | TwoPass


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def group_tile(width: int, sites: int) -> int:
    """Values of the tile that holds one group of `width` channels."""
    return power_of_two(width) * power_of_two(sites)


def heuristic(rows: int, groups: int, width: int, sites: int, statistics: bool = False, itemsize: int = 2) -> Config:
    """A configuration for a shape never timed; `width` is the number of channels in a group.

    One pass where a group fits on chip: one launch, and one program per row and group is enough for tensors this small.
    Otherwise, and where the statistics are given, two passes. Narrow groups are held in sets, so that a program reads
    at least 32 neighbouring channels, as long as that leaves 256 programs. Of 4-byte values half as many count as
    fitting: with two images, the full number spills on sm_80.
    """
    tile = group_tile(width, sites)
    if statistics or tile * itemsize > 2 * ON_CHIP:
        block_c = min(64, power_of_two(groups * width))
        return TwoPass(block_c=block_c, options=Options(num_warps=max(1, block_c // 8), num_stages=1))
    group_set = 1
    while group_set * width < 32 and tile * group_set < 8192 and rows * groups // (2 * group_set) >= 256:
        group_set *= 2
    warps = max(1, tile * group_set // (1024 if tile * group_set <= 8192 else 2048))
    return OnePass(group_set, Options(num_warps=warps, num_stages=1))


def search_space(
    rows: int, groups: int, width: int, sites: int, statistics: bool = False, itemsize: int = 2
) -> list[Config]:
    """What tuning tries."""
    made: list[Config] = [
        TwoPass(s, c, Options(num_warps=w, num_stages=1))
        for s in (16, 32, 64)
        for c in (32, 64, 128)
        for w in (4, 8)
        if 256 * w <= s * c <= 1024 * w
    ]
    tile = group_tile(width, sites)
    if not statistics:
        made += [
            OnePass(n, Options(num_warps=w, num_stages=1))
            for n in (1, 2, 4, 8)
            for w in (2, 4, 8, 16)
            if n <= groups and tile * n * itemsize <= 2 * ON_CHIP and 128 * w <= tile * n <= 2048 * w
        ]
    return made
