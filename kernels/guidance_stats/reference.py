"""Torch reference of `guidance_stats`: the definition of the op."""

import torch
from torch import Tensor


def guidance_stats(model_output: Tensor) -> tuple[Tensor, Tensor]:
    """Gram matrix and means of the guidance branches F_j of each row, over C, H, W.

    model_output  any float [R, J, C, H, W]

    Returns (gram [R, J, J], gram_ij = <F_i, F_j>, means [R, J]) in float32, in float64 for float64. With n = C H W, a
    guided prediction sum_j w_j F_j has the squared norm w'gram w and the variance (w'gram w - n (w'means)^2) / (n - 1),
    so rescaled, projected and normalised guidance (Lin et al. 2023, eq. 15; Sadat et al. 2024, eq. 7) are weights
    computed from these few numbers. The variance is exact while means are not large against deviations.
    """
    f = model_output.flatten(2)
    f = f.to(torch.promote_types(f.dtype, torch.float32))
    return f @ f.transpose(1, 2), f.mean(-1)
