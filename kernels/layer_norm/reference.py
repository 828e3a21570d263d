"""Torch reference of `layer_norm`: the definition of the op."""

import torch
import torch.nn.functional as F


def layer_norm(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension (Ba et al. 2016, eq. 4).

    x: [..., C]; weight, bias: [C] or None. Returns [..., C] in x's dtype, contiguous.
    """
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps).contiguous()
