"""Many matrices times one input: one GEMM where they lie one after another in memory, as they do after loading."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def project(x: Tensor, weights: Sequence[Tensor], bias: Tensor | None = None) -> Tensor:
    """x [..., D] times every weight [n_i, D], side by side: [..., sum of n_i]; bias: [sum of n_i].

    Never copies a weight: those that do not lie together (lent by another network, moved by `.to`) are multiplied one
    by one.
    """
    whole = stacked(weights)
    if whole is not None:
        return F.linear(x, whole, bias)
    parts = torch.cat([F.linear(x, weight) for weight in weights], -1)
    return parts if bias is None else parts + bias


def stacked(weights: Sequence[Tensor]) -> Tensor | None:
    """The matrices [n_i, D] as one view [sum of n_i, D], or None where they do not lie one after another.

    Read from their addresses at every call, so it holds whatever happened to the weights since they were loaded.
    """
    if torch.compiler.is_compiling():
        return None  # traced tensors have no address
    first, rows = weights[0], 0
    for weight in weights:
        together = (
            weight.untyped_storage()._cdata == first.untyped_storage()._cdata
            and weight.storage_offset() == first.storage_offset() + rows * first.shape[1]
            and weight.shape[1] == first.shape[1]
            and weight.dtype == first.dtype
            and weight.is_contiguous()
        )
        if not together:
            return None
        rows += weight.shape[0]
    return first.detach().as_strided((rows, first.shape[1]), (first.shape[1], 1), first.storage_offset())
