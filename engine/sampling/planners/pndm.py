"""Pseudo numerical methods (Liu et al. 2022): PLMS with a one-evaluation warm-up, or with Runge-Kutta steps first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...errors import RequestError
from ..levels import Levels
from ..predictions import denoised_coefficients
from ..schedules import NoiseSchedule
from ..update import Level, Update, evaluate_at

_ADAMS = {1: (1.0,), 2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}


@dataclass(frozen=True)
class Transfer:
    """Equation 9 of the paper as x' = R X + K F, from one level to another, for what the network predicts.

    As diffusers does, the multistep combination is formed of raw predictions and read at the level the step starts
    from: eps = alpha F + sigma X for v_prediction. (Combining eps instead is the method's own definition; the two
    differ by the change of alpha and sigma over the history.)
    """

    schedule: NoiseSchedule
    stride: int
    final: Level
    prediction: str

    def level(self, timestep: int) -> Level:
        """The level of a timestep; below 0 the final one."""
        return self.schedule.level(timestep) if timestep >= 0 else self.final

    def __call__(self, start: int, end: int) -> tuple[float, float]:
        """(R, K) from timestep `start` to `end`."""
        at, to = self.level(start), self.level(end)
        ratio = to.alpha / at.alpha
        gain = to.sigma - ratio * at.sigma
        if self.prediction == "v_prediction":
            return ratio + gain * at.sigma, gain * at.alpha
        return ratio, gain

    def raw(self, timestep: int) -> tuple[float, float]:
        """(ex, eD) with F = ex x + eD D at the level the network is evaluated at; eps itself if it predicts x0."""
        at = self.level(timestep)
        if self.prediction == "sample":
            return 1.0 / at.sigma, -at.alpha / at.sigma
        p, q = denoised_coefficients(self.prediction, at.alpha, at.sigma)
        return -p / q, 1.0 / q

    def update(self, timestep: int, step: int, **coefficients: Any) -> Update:
        """The update evaluated at a timestep."""
        return evaluate_at(self.level(timestep), step, **coefficients)


def plan_pndm(levels: Levels, prediction: str, *, skip_prk_steps: bool) -> list[Update]:
    """Updates over integer timesteps; every step goes down by count // steps, to the final level below 0.

    skip_prk_steps=True (Stable Diffusion): N + 1 evaluations; the first step is redone with the average of its two
    ends' predictions. False: three Runge-Kutta steps of four evaluations first, N + 9 in all, at least four steps.
    """
    stride = levels.schedule.count // levels.total
    transfer = Transfer(levels.schedule, stride, levels.final, prediction)
    grid, first_step = [int(at.timestep) for at in levels.at], levels.start
    if skip_prk_steps:
        return _warm_up(grid, transfer, first_step) + _multistep(grid, transfer, first_step, 1)
    if len(grid) < 4:
        raise RequestError(
            f"steps={len(grid)} with sampler 'pndm' and skip_prk_steps=false; use at least 4 steps, or another sampler"
        )
    return _runge_kutta(grid, transfer, first_step) + _multistep(grid, transfer, first_step, 3)


def _multistep(grid: list[int], transfer: Transfer, first_step: int, begin: int) -> list[Update]:
    """Adams-Bashforth with the weights of equal steps; `begin` steps were taken, each left one entry in the history."""
    updates = []
    for i in range(begin, len(grid)):
        R, K = transfer(grid[i], grid[i] - transfer.stride)
        ex, eD = transfer.raw(grid[i])
        w = [*(K * a for a in _ADAMS[min(4, i + 1)]), 0.0, 0.0, 0.0]
        updates.append(
            transfer.update(
                grid[i],
                first_step + i,
                A=R + w[0] * ex,
                B=w[0] * eD,
                C1=w[1],
                C2=w[2],
                C3=w[3],
                push=True,
                ex=ex,
                eD=eD,
            )
        )
    return updates


def _warm_up(grid: list[int], transfer: Transfer, first_step: int) -> list[Update]:
    R, K = transfer(grid[0], grid[0] - transfer.stride)
    ex, eD = transfer.raw(grid[0])
    first = transfer.update(
        grid[0], first_step, A=R + K * ex, B=K * eD, keep_base=False, A2=1.0, push=True, ex=ex, eD=eD
    )
    if len(grid) == 1:
        return [first]
    R, K = transfer(grid[1] + transfer.stride, grid[1])
    ex, eD = transfer.raw(grid[1])
    return [first, transfer.update(grid[1], first_step, G=R, A=0.5 * K * ex, B=0.5 * K * eD, C1=0.5 * K)]


def _runge_kutta(grid: list[int], transfer: Transfer, first_step: int) -> list[Update]:
    """Three classical fourth-order steps from X = x at the start of each: slopes k1..k4 at 0, 1/2, 1/2, 1.

    k1 goes to the history (PLMS needs it later) and X to the base. k2 is not stored: the third evaluation finds it in
    x2 = R X + K k2, and leaves in the base what the fourth only has to complete.
    """
    half = transfer.stride // 2
    updates = []
    for i in range(3):
        start, end, middle = grid[i], grid[i + 1], grid[i + 1] + half
        step = first_step + i
        R, K = transfer(start, start - half)
        ex, eD = transfer.raw(start)
        updates.append(
            transfer.update(start, step, A=R + K * ex, B=K * eD, keep_base=False, A2=1.0, push=True, ex=ex, eD=eD)
        )
        R2, K2 = transfer(start, middle)
        ex, eD = transfer.raw(middle)
        updates.append(transfer.update(middle, step, G=R2, A=K2 * ex, B=K2 * eD))
        R, K = transfer(start, end)
        # k2 = (x - R2 X) / K2; base' = R X + K (k2 + k3) / 3
        updates.append(
            transfer.update(
                middle,
                step,
                G=R,
                A=K * ex,
                B=K * eD,
                keep_base=False,
                A2=K / 3 * (1.0 / K2 + ex),
                B2=K / 3 * eD,
                G2=R - K / 3 * R2 / K2,
            )
        )
        ex, eD = transfer.raw(end)
        updates.append(transfer.update(end, step, G=1.0, C1=K / 6, A=K / 6 * ex, B=K / 6 * eD))
    return updates
