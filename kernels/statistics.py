"""Partial statistics of images: what one op leaves behind so that the next group norm need not read the image twice.

A tensor of partial statistics is [B, runs, 2, C]: index 0 of the third dimension is the mean, index 1 the sum of
squared deviations from that mean (M2), of every channel over one run of consecutive sites, in row-major site order.
float32 (float64 for float64 images). Per channel, because then any grouping can be formed from them: group norms of
other widths, of images with a channel bias added, and of two images side by side (concatenate along the last
dimension).
"""

from __future__ import annotations

import math

import torch


def sites_per_run(sites: int) -> int:
    """Length of a run in an image of `sites` sites: the power of two at or above its square root, at least 64.

    The square root keeps both reductions short: that inside a run and that over the runs. The last run may be shorter.
    """
    return max(64, 1 << (math.isqrt(max(int(sites), 1) - 1)).bit_length())


def run_count(sites: int) -> int:
    """Number of runs in an image of `sites` sites."""
    return -(-int(sites) // sites_per_run(sites))


def partial_statistics(image: torch.Tensor) -> torch.Tensor:
    """The partial statistics [B, runs, 2, C] of an image [B, C, ...]."""
    values = image.flatten(2).to(torch.promote_types(image.dtype, torch.float32))  # [B, C, S]
    sites = values.shape[2]
    run = sites_per_run(sites)
    whole = sites // run * run
    pieces = [values[..., :whole].unflatten(2, (-1, run))] if whole else []
    if whole < sites:
        pieces.append(values[..., whole:].unsqueeze(2))
    made = [torch.stack([mean, _squares(piece, mean)], -1) for piece in pieces for mean in (piece.mean(-1),)]
    return torch.cat(made, 2).permute(0, 2, 3, 1).contiguous()


def group_moments(
    statistics: torch.Tensor, sites: int, groups: int, added: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and (biased) variance [B, groups] from partial statistics [B, runs, 2, C] (Chan et al. 1983, eq. 2.1).

    added: [B, C] or [1, C], a constant added to every channel after the statistics were taken.
    """
    run, runs = sites_per_run(sites), statistics.shape[1]
    lengths = statistics.new_full((runs, 1), run)
    lengths[-1] = sites - (runs - 1) * run
    mean, squares = statistics.unbind(2)  # [B, runs, C]
    if added is not None:
        mean = mean + added[:, None].to(mean.dtype)
    mean, squares = (t.unflatten(2, (groups, -1)) for t in (mean, squares))  # [B, runs, G, C / G]
    weight = lengths[:, :, None] / (sites * mean.shape[3])
    centre = (mean * weight).sum((1, 3))
    apart = (mean - centre[:, None, :, None]).square() * weight
    return centre, squares.sum((1, 3)) / (sites * mean.shape[3]) + apart.sum((1, 3))


def check(statistics: torch.Tensor, rows: int, channels: int, sites: int) -> None:
    """Raise ValueError if `statistics` is not of the shape of an image [rows, channels, sites]."""
    wanted = (rows, run_count(sites), 2, channels)
    if tuple(statistics.shape) != wanted:
        raise ValueError(
            f"partial_stats: got shape {tuple(statistics.shape)}, expected [rows, runs, 2, channels] = {wanted}; "
            "with x2, concatenate the statistics of both images along the last dimension"
        )


def _squares(values: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    return (values - mean.unsqueeze(-1)).square().sum(-1)
