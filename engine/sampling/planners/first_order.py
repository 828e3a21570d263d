"""Samplers of one evaluation per step and no history: DDIM, DDPM, Euler ancestral, LCM."""

from __future__ import annotations

import math

from ..levels import Levels
from ..update import Level, Update, evaluate_at


def plan_ddim(levels: Levels, *, eta: float = 0.0, clipped: bool = False) -> list[Update]:
    """DDIM (Song et al. 2021, equations 12 and 16).

    x' = alpha' D + sqrt(sigma'^2 - S^2) eps + S xi,  eps = (x - alpha D) / sigma,  S = eta times DDPM's deviation.
    `clipped`: D is clamped in the first term only, eps stays what the network said (diffusers' default).
    """
    updates = []
    for i, (at, to) in enumerate(zip(levels.at, levels.to, strict=True)):
        noise = eta * posterior_deviation(at, to)
        A = math.sqrt(max(to.sigma**2 - noise**2, 0.0)) / at.sigma
        B, direction = to.alpha, -at.alpha * A
        coefficients = {"B": B, "B_raw": direction} if clipped else {"B": B + direction}
        updates.append(evaluate_at(at, levels.start + i, A=A, S=noise, **coefficients))
    return updates


def plan_ddpm(levels: Levels, *, variance: str = "fixed_small") -> list[Update]:
    """Ancestral sampling (Ho et al. 2020, equation 7): x' = mean of q(x' | x, D) + S xi.

    `variance`: fixed_small, fixed_small_log: the posterior deviation; fixed_large, fixed_large_log: sqrt(beta_t). As in
    diffusers the last step draws no noise if it is at timestep 0. diffusers' fixed_large_log takes the root of a
    logarithm, which is NaN; here it is fixed_large, what the name meant in GLIDE.

    learned_range: the network's v in [-1, 1] interpolates between the logarithms of the two, v = 1 is beta_t (Nichol &
    Dhariwal 2021, equation 15); learned: v is the variance itself, as diffusers reads it.
    """
    updates = []
    for i, (at, to) in enumerate(zip(levels.at, levels.to, strict=True)):
        small = posterior_deviation(at, to)
        A = math.sqrt(max(to.sigma**2 - small**2, 0.0)) / at.sigma
        skipped = to is levels.to[-1] and at.timestep == 0.0
        noise = {} if skipped else _noise_terms(variance, small, math.sqrt(1.0 - (at.alpha / to.alpha) ** 2))
        updates.append(evaluate_at(at, levels.start + i, A=A, B=to.alpha - at.alpha * A, **noise))
    return updates


def _noise_terms(variance: str, small: float, large: float) -> dict[str, float]:
    """The noise columns of one DDPM step whose deviation lies between `small` and `large`."""
    if variance == "learned_range":
        # S exp(V_LOG v), S the geometric mean. A last step to no noise has small = 0, clamped as in diffusers.
        low, high = math.log(max(small, 1e-10)), math.log(large)
        return {"S": math.exp((high + low) / 2), "v_log": (high - low) / 2}
    if variance == "learned":
        return {"S": large, "v_root": 1.0 / large}
    return {"S": large if variance.startswith("fixed_large") else small}


def plan_euler_ancestral(levels: Levels, *, eta: float = 1.0) -> list[Update]:
    """Euler to sigma_down, then noise up to sigma' (k-diffusion `sample_euler_ancestral`). The row of DDIM(eta)."""
    return plan_ddim(levels, eta=eta)


def plan_lcm(levels: Levels, *, timestep_scaling: float = 10.0) -> list[Update]:
    """Multistep consistency sampling (Luo et al. 2023, algorithm 3): x' = alpha' f + sigma' xi, last step x' = f.

    f = c_skip x + c_out D with c_skip = s^2 / ((k t)^2 + s^2), c_out = k t / sqrt((k t)^2 + s^2), s = 1/2 and
    k = timestep_scaling.
    """
    updates = []
    for i, (at, to) in enumerate(zip(levels.at, levels.to, strict=True)):
        scaled = at.timestep * timestep_scaling
        c_skip, c_out = 0.25 / (scaled**2 + 0.25), scaled / math.hypot(scaled, 0.5)
        updates.append(evaluate_at(at, levels.start + i, A=to.alpha * c_skip, B=to.alpha * c_out, S=to.sigma))
    return updates


def posterior_deviation(at: Level, to: Level) -> float:
    """Standard deviation of q(x' | x, x0): sigma' sqrt(1 - e^2), e = alpha sigma' / (alpha' sigma)."""
    decay = at.alpha * to.sigma / (to.alpha * at.sigma)
    return to.sigma * math.sqrt(max(1.0 - decay**2, 0.0))
