"""Launch configuration of `sampler_step`."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..launch import Options


@dataclass(frozen=True)
class Config:
    """Elements of one row that one program updates: a multiple of 4, the elements of one Philox counter.

    FMA contraction is off: apart from the noise, a GPU then makes the bits of the reference on a CPU.
    """

    block: int = 512
    options: Options = field(default_factory=lambda: Options(num_warps=4, num_stages=1, enable_fp_fusion=False))


def heuristic(rows: int, elements: int) -> Config:
    """A configuration for a shape never timed: four elements a thread, and small blocks where there are few."""
    return Config(block=512 if rows * elements >= 64 * 512 else 256)


def search_space(rows: int, elements: int) -> list[Config]:
    """What tuning tries."""
    return [
        Config(block, Options(num_warps=warps, num_stages=1, enable_fp_fusion=False))
        for block in (256, 512, 1024, 2048)
        for warps in (1, 2, 4, 8)
        if 2 <= block // (32 * warps) <= 16
    ]
