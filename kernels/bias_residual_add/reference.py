"""Torch reference of `bias_residual_add`: the definition of the op."""

import torch

from ..op import same_layout
from ..statistics import partial_statistics


def bias_residual_add(
    x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """y = x + bias + residual, the exit of a residual or transformer block, and the partial statistics of y.

    x, residual: [B, C, H, W] or [B, C, L]; bias: [C] or None, what a convolution or projection left out.
    Returns y in x's dtype and memory format and its statistics [B, runs, 2, C] float32 (kernels/statistics.py), which
    `group_norm_silu` takes as `partial_stats`.
    """
    y = x + residual if bias is None else x + bias.reshape(-1, *(1,) * (x.dim() - 2)) + residual
    y = same_layout(y.to(x.dtype), x)
    return y, partial_statistics(y)
