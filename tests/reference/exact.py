"""Denoisers that are known: of independent values of N(MEAN, VARIANCE), in every form a network can predict."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

MEAN, VARIANCE = 1.5, 0.25


def rows(t: Tensor, x: Tensor) -> Tensor:
    return t.reshape(-1, *[1] * (x.dim() - 1))


def epsilon(x: Tensor, sigma: Tensor, mean: Tensor | float = MEAN) -> Tensor:
    """E[eps | x] of data N(mean, VARIANCE), x = (x0 + sigma eps) / sqrt(1 + sigma^2)."""
    s = rows(sigma, x)
    norm = torch.sqrt(1 + s * s)
    return s * (norm * x - mean) / (VARIANCE + s * s)


def v_prediction(x: Tensor, sigma: Tensor) -> Tensor:
    s = rows(sigma, x)
    norm = torch.sqrt(1 + s * s)
    return (epsilon(x, sigma) - s * sample(x, sigma)) / norm


def sample(x: Tensor, sigma: Tensor) -> Tensor:
    s = rows(sigma, x)
    return torch.sqrt(1 + s * s) * x - s * epsilon(x, sigma)


def score(x: Tensor, sigma: Tensor) -> Tensor:
    s = rows(sigma, x)
    variance = (VARIANCE + s * s) / (1 + s * s)
    return -(x - MEAN / torch.sqrt(1 + s * s)) / variance


def flow(x: Tensor, t: Tensor) -> Tensor:
    """E[eps - x0 | x], x = (1 - t) x0 + t eps."""
    t = rows(t, x)
    share = (x - (1 - t) * MEAN) / ((1 - t) ** 2 * VARIANCE + t * t)
    return t * share - (MEAN + (1 - t) * VARIANCE * share)


EXACT: dict[str, Callable[..., Tensor]] = {
    "epsilon": epsilon, "v_prediction": v_prediction, "sample": sample, "score": score, "flow": flow}  # fmt: skip


def conditional(x: Tensor, sigma: Tensor, mean: Tensor) -> Tensor:
    return epsilon(x, sigma, mean[:, None])  # one mean for every axis of the points
