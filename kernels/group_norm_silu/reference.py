"""Torch reference of `group_norm_silu`: the definition of the op."""

import torch
import torch.nn.functional as F

from ..op import same_layout
from ..statistics import check, group_moments


def group_norm_silu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float,
    silu: bool = True,
    pre_bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    x2: torch.Tensor | None = None,
    partial_stats: torch.Tensor | None = None,
) -> torch.Tensor:
    """silu(group_norm(cat(x, x2) + pre_bias) * (1 + scale) + shift) (Wu & He 2018, eq. 1).

    x: [B, C1, H, W] or [B, C1, L]; x2: more channels of the same rows and sites, normalised as if concatenated after x.
    weight, bias: [C] with C = C1 + C2; groups divides C; eps is added to the variance.
    pre_bias: [B, C] or [1, C], added before the statistics (a time embedding); scale, shift: [B, C], after the affine
    part. silu=False leaves the activation out.
    partial_stats: [B, runs, 2, C] float32, the statistics of cat(x, x2) without pre_bias (kernels/statistics.py), as
    `bias_residual_add` returns them: they are used in place of the image's own.
    Returns [B, C, ...] in x's dtype and memory format. Raises ValueError for statistics of another shape.
    """
    joined = x if x2 is None else torch.cat([x, x2], 1)
    sites = (1,) * (joined.dim() - 2)
    if pre_bias is not None:
        joined = joined + pre_bias.reshape(*pre_bias.shape, *sites)
    if partial_stats is None:
        y = F.group_norm(joined, groups, weight, bias, eps)
    else:
        area = x.shape[2:].numel()
        check(partial_stats, x.shape[0], joined.shape[1], area)
        mean, var = group_moments(partial_stats, area, groups, pre_bias)  # [B, G]
        grouped = joined.flatten(2).unflatten(1, (groups, -1))  # [B, G, C / G, S]
        y = (grouped - mean[..., None, None]) * torch.rsqrt(var + eps)[..., None, None]
        affine = y.reshape(joined.shape) * weight.reshape(-1, *sites) + bias.reshape(-1, *sites)
        y = affine.to(joined.dtype)
    if scale is not None:
        y = y * (1 + scale.reshape(*scale.shape, *sites))
    if shift is not None:
        y = y + shift.reshape(*shift.shape, *sites)
    # y is this function's own: in place, a large image costs no second buffer (its page faults took longer than SiLU).
    # Out of place where group_norm's strides of extents of 1 are not those that everybody else expects.
    inplace = not torch.compiler.is_compiling() and y.stride() == joined.stride() and 1 not in y.shape[2:]
    return same_layout(F.silu(y, inplace=inplace) if silu else y, x)
