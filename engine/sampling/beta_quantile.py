"""The quantile function of the Beta distribution, so that the beta schedule needs no scipy."""

from __future__ import annotations

import math


def beta_quantile(u: float, a: float, b: float) -> float:
    """x with I_x(a, b) = u, to about 1e-15 absolute; u in [0, 1], a and b positive.

    Bisection on the regularised incomplete beta function: 60 halvings of [0, 1/2], of the reflected function where the
    quantile is above 1/2, so that quantiles near both ends keep their precision.
    """
    if u <= 0.0 or u >= 1.0:
        return min(max(u, 0.0), 1.0)
    if u > incomplete_beta(0.5, a, b):
        return 1.0 - _lower_quantile(1.0 - u, b, a)
    return _lower_quantile(u, a, b)


def _lower_quantile(u: float, a: float, b: float) -> float:
    low, high = 0.0, 0.5
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if incomplete_beta(middle, a, b) < u else (low, middle)
    return 0.5 * (low + high)


def incomplete_beta(x: float, a: float, b: float) -> float:
    """Regularised incomplete beta I_x(a, b) for x in [0, 1] (power series, DLMF 8.17.8; reflected above 1/2)."""
    if x <= 0.0 or x >= 1.0:
        return min(max(x, 0.0), 1.0)
    if x > 0.5:
        return 1.0 - incomplete_beta(1.0 - x, b, a)
    # I_x = x^a (1-x)^b / (a B(a,b)) * sum_n (a+b)_n / (a+1)_n x^n
    total, term, n = 0.0, 1.0, 0
    while term > 1e-17 * total:
        total += term
        term *= (a + b + n) / (a + 1.0 + n) * x
        n += 1
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    return math.exp(a * math.log(x) + b * math.log1p(-x) - log_beta) / a * total
