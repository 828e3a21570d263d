"""Dynamic thresholding on the device: the denoised estimate of every row and the limit it is kept to."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.sampler_step.columns import Column
from ...kernels.sampler_step.reference import term


def raw_estimate(x: Tensor, outputs: Tensor, weights: Tensor, lines: Tensor) -> Tensor:
    """D_raw = P x + Q sum_j w_j F_j, like x [R, C, H, W], added up in the order of `sampler_step`.

    outputs: any float [R, J, C, H, W]; weights: [R, J]; lines: the rows' table lines [R, len(Column)]. A term whose
    coefficient is 0 is not read.
    """
    total = torch.zeros_like(x)
    for j, weight in enumerate(weights.to(x.dtype)[:, :, None, None, None].unbind(1)):
        total = total + term(weight, outputs[:, j].to(x.dtype))
    p, q = (lines[:, column, None, None, None].to(x.dtype) for column in (Column.P, Column.Q))
    return term(p, x) + term(q, total)


def limits(raw: Tensor, threshold: Tensor) -> Tensor:
    """What every row's estimate raw [R, C, H, W] is kept to and divided by, like raw [R]; 0 for rows without one.

    threshold: float64 [R, 2], percentile p and largest limit of every row (`DynamicThreshold`), p = 0 for none:
    s = min(max(quantile_p(|raw|), 1), most). Nothing waits for the device, and no row depends on another.
    """
    p, most = threshold.unbind(1)
    s = quantile(raw.abs().flatten(1), p).clamp_min(1.0)
    return torch.where(p > 0, torch.minimum(s, most.to(s.dtype)), 0.0)


def bounded(raw: Tensor, bound: Tensor, limit: Tensor | None) -> Tensor:
    """The estimate D of `sampler_step`: clamp(raw, -s, s) / s where limit s [R] is positive, else clamped to bound [R].

    raw: [R, C, H, W].
    """
    divisor = torch.ones_like(bound)
    if limit is not None:
        bound, divisor = torch.where(limit > 0, limit, bound), torch.where(limit > 0, limit, divisor)
    s = bound[:, None, None, None]
    return raw.clamp(-s, s) / divisor[:, None, None, None]


def quantile(values: Tensor, p: Tensor) -> Tensor:
    """Quantile p of every row, like values [R]: linear between the two sorted values next to rank p (N - 1).

    values: float [R, N], N >= 1; p: float64 [R], 0 to 1, for every row its own. As `torch.quantile`, without its limit
    of 16 million elements, and with the rank in float64 whatever the dtype: in float32 a rank above 2^21 is rounded to
    quarters. NaN counts as the largest. One sort, because topk and kthvalue want the rank on the host.
    """
    ordered, last = values.sort(dim=1).values, values.shape[1] - 1
    rank = p * last
    below = rank.long()  # rounds down, p is not negative
    low, high = (ordered.gather(1, place[:, None]).squeeze(1) for place in (below, (below + 1).clamp_max(last)))
    return low + (rank - below).to(values.dtype) * (high - low)  # a lerp's last bit depends on how many rows there are
