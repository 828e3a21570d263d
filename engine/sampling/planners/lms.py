"""Linear multistep in sigma: Adams-Bashforth with variable steps (k-diffusion `sample_lms`)."""

from __future__ import annotations

import math

from ..levels import Levels
from ..update import Update, evaluate_at

# Two Gauss points integrate cubics exactly: the Lagrange polynomials of order four and below.
_GAUSS = (-1.0 / math.sqrt(3.0), 1.0 / math.sqrt(3.0))


def plan_lms(levels: Levels, *, order: int = 4) -> list[Update]:
    """x' = x + sum_k w_k d_{i-k}, d = (x - D) / sigma, w_k the integral of the k-th Lagrange polynomial over the step.

    `order` at most 4. The history starts empty, also when steps were skipped.
    """
    updates = []
    for i, (at, to) in enumerate(zip(levels.at, levels.to, strict=True)):
        nodes = [levels.at[i - k].sigma for k in range(min(order, i + 1))]
        w = [*_weights(nodes, at.sigma, to.sigma), 0.0, 0.0, 0.0]
        slope = 1.0 / at.sigma
        updates.append(
            evaluate_at(
                at,
                levels.start + i,
                A=1.0 + w[0] * slope,
                B=-w[0] * slope,
                C1=w[1],
                C2=w[2],
                C3=w[3],
                push=True,
                ex=slope,
                eD=-slope,
            )
        )
    return updates


def _weights(nodes: list[float], start: float, end: float) -> list[float]:
    centre, half = 0.5 * (start + end), 0.5 * (end - start)
    weights = []
    for j, own in enumerate(nodes):
        others = [s for k, s in enumerate(nodes) if k != j]
        weights.append(half * sum(math.prod((centre + half * g - s) / (own - s) for s in others) for g in _GAUSS))
    return weights
