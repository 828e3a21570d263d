"""DPM-Solver++ multistep (Lu et al. 2022b) and its SDE form, orders one to three, on the history of D."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..levels import Levels
from ..update import Level, Update, evaluate_at


@dataclass(frozen=True)
class Solver:
    """Options of the solver; names as in diffusers' DPMSolverMultistepScheduler."""

    order: int = 2
    kind: str = "midpoint"
    sde: bool = False
    lower_order_final: bool = True
    euler_at_final: bool = False

    def order_at(self, index: int, levels: Levels) -> int:
        """Order of step `index`: what the history allows, lowered at the end as diffusers lowers it."""
        order, short = min(self.order, index + 1), self.lower_order_final and levels.total < 15
        left = len(levels.at) - 1 - index + levels.left
        if left == 0 and (self.euler_at_final or short or levels.to[index].sigma == 0.0):
            return 1
        return min(order, 2) if left == 1 and short else order


def plan_dpmpp(levels: Levels, *, solver: Solver) -> list[Update]:
    """Exponential multistep in lambda = ln(alpha / sigma), h = lambda' - lambda:

        x' = sigma'/sigma e^(-eta h) x + alpha' (1 - e^(-(1+eta) h)) D + corrections from D_{-1}, D_{-2} + S xi

    with eta = 1 for the SDE. The second and third order corrections carry the weights of the published code (the third
    order term has the constant of Lu's implementation, under which the method measures second order). For the SDE at
    order three the sign of the 1/2 is k-diffusion's; diffusers' differs, and converges at first order.
    """
    return [_update(levels, i, solver) for i in range(len(levels.at))]


def _update(levels: Levels, i: int, solver: Solver) -> Update:
    at, to = levels.at[i], levels.to[i]
    eta = 1.0 if solver.sde else 0.0
    order = solver.order_at(i, levels)
    h = _lam(to) - _lam(at)
    z = (1.0 + eta) * h
    first = to.alpha * -math.expm1(-z)
    A = to.sigma / at.sigma * math.exp(-eta * h) if to.sigma else 0.0
    S = to.sigma * math.sqrt(-math.expm1(-2.0 * h)) if solver.sde and to.sigma else 0.0
    B, C1, C2 = first, 0.0, 0.0
    if order > 1:
        r0 = (_lam(at) - _lam(levels.at[i - 1])) / h
        second = to.alpha * (1.0 + math.expm1(-z) / z)
        if order == 2:
            slope = (0.5 * first if solver.kind == "midpoint" else second) / r0
            B, C1 = first + slope, -slope
        else:
            r1 = (_lam(levels.at[i - 1]) - _lam(levels.at[i - 2])) / h
            third = to.alpha * (0.5 - (math.expm1(-z) + z) / z**2)
            # D1 = d0 + r0/(r0+r1) (d0 - d1), D2 = (d0 - d1)/(r0+r1), d0 = (D - D_{-1})/r0, d1 = (D_{-1} - D_{-2})/r1
            w0 = second * (1.0 + r0 / (r0 + r1)) + third / (r0 + r1)
            w1 = -second * r0 / (r0 + r1) - third / (r0 + r1)
            B, C1, C2 = first + w0 / r0, -w0 / r0 + w1 / r1, -w1 / r1
    return evaluate_at(at, levels.start + i, A=A, B=B, C1=C1, C2=C2, S=S, push=True, eD=1.0)


def _lam(level: Level) -> float:
    return math.inf if level.sigma == 0.0 else math.log(level.alpha) - math.log(level.sigma)
