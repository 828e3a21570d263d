"""What an op call must move and compute, counted in the open: a bandwidth without its byte accounting says nothing.

Every input is read once and every output written once, with one exception: a group norm of an image larger than the
L2 cache keeps reads the image twice (statistics, then normalisation), unless the statistics are given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

CACHED_BYTES = 40_000_000
"""An image up to this size is still in the L2 cache (50 MB on Hopper) when it is read for the second time."""


@dataclass(frozen=True)
class Work:
    """Bytes moved, how they were counted, and floating-point operations (0 where only bytes matter)."""

    bytes: int
    accounting: str
    flops: float


def count(op: str, arguments: Mapping[str, Any], outputs: Sequence[torch.Tensor]) -> Work:
    """The work of one call. X in the accounting is the size of the first output; of a reduction, of the first input."""
    tensors = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    unit = size(outputs[0])
    if 100 * unit < (first := size(next(iter(tensors.values())))):
        unit = first
    reads = {name: size(tensor) for name, tensor in tensors.items()}
    twice: list[str] = []
    if op == "group_norm_silu" and "partial_stats" not in tensors and unit > CACHED_BYTES:
        twice = [name for name in ("x", "x2") if name in tensors]
        for name in twice:
            reads[name] *= 2
    total = sum(reads.values()) + sum(map(size, outputs))
    main = [name for name, tensor in tensors.items() if size(tensor) >= unit / 100]
    parts = [f"{name} twice" if name in twice else name for name in main]
    text = f"{total / unit:.2f}X: reads {', '.join(parts)}; writes {len(outputs)}; X = {unit / 1e6:.3g} MB"
    return Work(total, text, _flops(op, tensors))


def size(tensor: torch.Tensor) -> int:
    """Bytes of the values of a tensor, gaps between them left out."""
    return tensor.numel() * tensor.element_size()


def _flops(op: str, tensors: Mapping[str, torch.Tensor]) -> float:
    if op != "attention":
        return 0.0
    rows, queries, heads, width = tensors["q"].shape
    return 4.0 * rows * heads * queries * tensors["k"].shape[1] * width
