"""Euler and Heun in sigma with optional churn: the stochastic sampler of Karras et al. 2022, algorithm 2."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..levels import Levels
from ..update import Level, Update, evaluate_at


@dataclass(frozen=True)
class Churn:
    """S_churn, S_tmin, S_tmax and S_noise of algorithm 2; the default adds no noise."""

    amount: float = 0.0
    t_min: float = 0.0
    t_max: float = math.inf
    noise: float = 1.0

    def raised(self, levels: Levels) -> tuple[list[Level], list[float]]:
        """Every step's level sigma_hat, and the deviation of the noise that lifts x there.

        The network is told the timestep of sigma_hat (k-diffusion), found in the schedule by ln(sigma).
        """
        share = min(self.amount / levels.total, math.sqrt(2.0) - 1.0)
        raised, added = [], []
        for at in levels.at:
            gamma = share if self.t_min <= at.sigma <= self.t_max else 0.0
            sigma = at.sigma * (1.0 + gamma)
            raised.append(Level(1.0, sigma, levels.schedule.timestep_of(sigma)) if gamma > 0.0 else at)
            added.append(self.noise * math.sqrt(max(sigma**2 - at.sigma**2, 0.0)))
        return raised, added


def plan_euler(levels: Levels, *, churn: Churn) -> tuple[list[Update], float]:
    """Euler's method on dx/dsigma = (x - D) / sigma. Returns the updates and the churn of the first step.

    The noise that lifts step i+1 to its sigma_hat is added by update i, so churn costs nothing extra; the first step's
    is independent of the initial noise and merges with it.
    """
    raised, added = churn.raised(levels)
    updates = []
    for i, (at, to) in enumerate(zip(raised, levels.to, strict=True)):
        ratio = to.sigma / at.sigma
        updates.append(evaluate_at(at, levels.start + i, A=ratio, B=1.0 - ratio, S=_next(added, i)))
    return updates, added[0]


def plan_heun(levels: Levels, *, churn: Churn) -> tuple[list[Update], float]:
    """Heun's method: an Euler predictor to sigma', then the average of both slopes; the last step to 0 is Euler.

    Predictor: keeps x as base and pushes the slope d = (x - D) / sigma. Corrector: x' = base + dt (d + d') / 2.
    """
    raised, added = churn.raised(levels)
    updates = []
    for i, (at, to) in enumerate(zip(raised, levels.to, strict=True)):
        step, ratio = levels.start + i, to.sigma / at.sigma
        if to.sigma == 0.0:
            updates.append(evaluate_at(at, step, A=ratio, B=1.0 - ratio, S=_next(added, i)))
            continue
        slope = 1.0 / at.sigma
        updates.append(
            evaluate_at(at, step, A=ratio, B=1.0 - ratio, keep_base=False, A2=1.0, push=True, ex=slope, eD=-slope)
        )
        half = 0.5 * (to.sigma - at.sigma)
        updates.append(evaluate_at(to, step, G=1.0, C1=half, A=half / to.sigma, B=-half / to.sigma, S=_next(added, i)))
    return updates, added[0]


def _next(added: list[float], index: int) -> float:
    return added[index + 1] if index + 1 < len(added) else 0.0
