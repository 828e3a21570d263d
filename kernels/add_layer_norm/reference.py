"""Torch reference of `add_layer_norm`: the definition of the op."""

import torch
import torch.nn.functional as F


def add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """s = x + residual and (s - mean) / sqrt(var + eps) * weight + bias over the last dimension (Ba et al. 2016).

    x, residual: [..., C] of one dtype; weight, bias: [C] or None. Returns the normalised values and s, both [..., C] in
    x's dtype, contiguous: a transformer block's attention adds to the stream, and the next branch normalises the sum.
    """
    total = (x + residual).contiguous()
    return F.layer_norm(total, total.shape[-1:], weight, bias, eps).contiguous(), total
