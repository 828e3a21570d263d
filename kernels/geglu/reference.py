"""Torch reference of `geglu`: the definition of the op."""

import torch
import torch.nn.functional as F


def geglu(x: torch.Tensor) -> torch.Tensor:
    """a * gelu(b) with a, b the halves of the last dimension and the exact (erf) GELU (Shazeer 2020, eq. 6).

    x: [..., 2C], C >= 1. Returns [..., C] in x's dtype, contiguous.
    """
    a, b = x.chunk(2, -1)
    return (a * F.gelu(b)).contiguous()
