"""Samplers on problems with known solutions: order of convergence, moments of Gaussian data, stochastic Heun."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from reference.sampling import Exact, Mixture, draw, network, run, worst
from torch import Tensor

from stepfuse.engine.sampling.planning import make_plan
from stepfuse.engine.sampling.schedules import SchedulerConfig, karras_sigmas
from stepfuse.engine.sampling.update import Plan
from stepfuse.kernels.sampler_step.columns import Column
from stepfuse.kernels.sampler_step.reference import sampler_step

CONFIG = SchedulerConfig.from_diffusers(
    {
        "_class_name": "DDIMScheduler",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "skip_prk_steps": True,
    }
)
MIXTURE = Mixture(3, 2, seed=3)
POINTS = torch.randn(1, 2, 64, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def solution(start: float, end: float) -> Tensor:
    """The probability flow ODE of the mixture from POINTS * start, by 1024 classical Runge-Kutta steps in ln sigma."""
    x, grid = POINTS * start, torch.linspace(math.log(start), math.log(end), 1025, dtype=torch.float64).tolist()

    def slope(x: Tensor, log_sigma: float) -> Tensor:
        return x - MIXTURE(x, 1.0, math.exp(log_sigma))

    for a, b in itertools.pairwise(grid):
        h, m = b - a, 0.5 * (a + b)
        k1 = slope(x, a)
        k2 = slope(x + 0.5 * h * k1, m)
        k3 = slope(x + 0.5 * h * k2, m)
        k4 = slope(x + h * k3, b)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


@pytest.mark.parametrize(
    ("sampler", "order", "coarsest"),
    [("ddim", 1, 0.08), ("euler", 1, 0.08), ("heun", 2, 0.02), ("lms", 2, 0.02), ("dpmpp_2m", 2, 0.02)],
)
def test_order_of_convergence(sampler: str, order: int, coarsest: float) -> None:
    exact, errors = solution(6.0, 0.25), []
    for steps in (24, 48, 96, 192):
        sigmas = np.exp(np.linspace(math.log(6.0), math.log(0.25), steps + 1)).tolist()
        plan = make_plan(CONFIG, steps=steps, sampler=sampler, sigmas=sigmas)
        first = plan.updates[0]
        end = run(plan, POINTS * first.sigma, Exact(plan, MIXTURE))[-1]
        alpha = 1.0 if first.alpha == 1.0 else 1.0 / math.hypot(1.0, 0.25)
        errors.append(float((end / alpha - exact).abs().max()))
    measured = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert errors[0] < coarsest
    assert measured[-1] == pytest.approx(order, abs=0.25)


def test_pndm_order_of_convergence() -> None:
    """From the first level of each grid to the level of timestep 0, where PNDM ends by default."""
    errors = []
    for stride in (40, 20, 10, 5):
        plan = make_plan(CONFIG, steps=1000 // stride, sampler="pndm")
        first = plan.updates[0]
        end = run(plan, POINTS * first.sigma, Exact(plan, MIXTURE))[-1]
        bar = (1.0 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2)[0]
        sigma = math.sqrt((1.0 - bar) / bar)
        exact = solution(first.sigma / first.alpha, sigma)
        errors.append(float((end / math.sqrt(bar) - exact).abs().max()))
    measured = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    # The grid is uniform in t, so near t = 0 the steps in ln sigma are long: the order grows towards 2 with the steps.
    assert errors[0] < 0.03
    assert measured == sorted(measured)
    assert measured[-1] > 1.45


MEAN, VARIANCE = 0.7, 0.09


def moments(plan: Plan) -> tuple[float, float]:
    """Mean and deviation of the final x for Gaussian data, exactly.

    Every state is a linear form in (1, x_init, xi_0, xi_1, ...). The op itself runs on the coefficients of that form;
    the optimal denoiser of Gaussian data is affine.
    """
    count = len(plan.updates)
    unit = torch.eye(count + 2, dtype=torch.float64).reshape(count + 2, 1, 1, 1, count + 2)
    table, zero = torch.from_numpy(plan.table()).unsqueeze(0), torch.zeros_like(unit[0])
    x, base, history = unit[1], zero, torch.zeros(1, 3, 1, 1, count + 2, dtype=torch.float64)
    one, seeds = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    for i, u in enumerate(plan.updates):
        gain = u.alpha * VARIANCE / (u.alpha**2 * VARIANCE + u.sigma**2)
        D = (MEAN - gain * u.alpha * MEAN) * unit[0] + gain * x
        output = ((D - u.p * x) / u.q).unsqueeze(1)
        noise = torch.stack((unit[2 + i], unit[1 + i] if i else zero), 1)
        x, base, history, _, _ = sampler_step(
            x, base, history, output, table, torch.tensor([i]), one, seeds, extra_noise=noise
        )
    constant, initial, *noise_terms = x.flatten().tolist()
    a, s = plan.updates[0].alpha, plan.updates[0].sigma
    variance = initial**2 * (a**2 * VARIANCE + s**2) + sum(w * w for w in noise_terms)
    return constant + initial * a * MEAN, math.sqrt(variance)


@pytest.mark.parametrize(
    ("sampler", "options", "expected"),
    [
        ("euler_a", {}, (-0.40, -0.24, -0.14, -0.072, -0.037)),
        ("ddpm", {}, (-0.40, -0.24, -0.14, -0.072, -0.037)),
        ("ddim", {"eta": 1.0}, (-0.40, -0.24, -0.14, -0.072, -0.037)),
        ("ddim", {}, (-0.27, -0.14, -0.071, -0.036, -0.018)),
        ("euler", {}, (-0.27, -0.14, -0.071, -0.036, -0.018)),
        ("heun", {"s_churn": 40.0, "s_tmin": 0.05, "s_tmax": 50.0}, (0.38, 0.10, 0.037, 0.016, 0.0046)),
    ],
)
def test_moments_of_gaussian_data(sampler: str, options: dict[str, Any], expected: tuple[float, ...]) -> None:
    """Relative error of the deviation at 10, 20 ... 160 steps; the values are those of the published methods."""
    for steps, value in zip((10, 20, 40, 80, 160), expected, strict=True):
        sigmas = [*karras_sigmas(steps, 0.01, 80.0).tolist(), 0.0]
        mean, deviation = moments(make_plan(CONFIG, steps=steps, sampler=sampler, sigmas=sigmas, **options))
        assert deviation / math.sqrt(VARIANCE) - 1.0 == pytest.approx(value, rel=0.08)
        assert abs(mean - MEAN) < 0.02


def edm_algorithm_2(
    sigmas: list[float], x: Tensor, noises: list[Tensor], churn: tuple[float, float, float, float], heun: bool
) -> Tensor:
    """Karras et al. 2022, algorithm 2, as printed; epsilon prediction by `network` at timestep 100 ln sigma."""

    def slope(x: Tensor, sigma: float) -> Tensor:
        return network(x / math.hypot(sigma, 1.0), 100.0 * math.log(sigma))

    s_churn, s_tmin, s_tmax, s_noise = churn
    count = len(sigmas) - 1
    for i, (now, then) in enumerate(itertools.pairwise(sigmas)):
        gamma = min(s_churn / count, math.sqrt(2.0) - 1.0) if s_tmin <= now <= s_tmax else 0.0
        hat = now * (1.0 + gamma)
        x = x + math.sqrt(hat**2 - now**2) * s_noise * noises[i]
        d = slope(x, hat)
        x_next = x + (then - hat) * d
        if heun and then > 0.0:
            x_next = x + (then - hat) * 0.5 * (d + slope(x_next, then))
        x = x_next
    return x


@pytest.mark.parametrize("churn", [(0.0, 0.0, math.inf, 1.0), (8.0, 0.0, math.inf, 1.0), (30.0, 0.1, 5.0, 1.003)])
@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_churn_is_algorithm_2_of_edm(sampler: str, churn: tuple[float, float, float, float]) -> None:
    steps = 12
    sigmas = [*karras_sigmas(steps, 0.05, 14.0).tolist(), 0.0]
    names = ("s_churn", "s_tmin", "s_tmax", "s_noise")
    plan = make_plan(CONFIG, steps=steps, sampler=sampler, sigmas=sigmas, **dict(zip(names, churn, strict=True)))
    unit, *noises = draw(1 + steps)
    exact = edm_algorithm_2(sigmas, unit * sigmas[0], noises, churn, sampler == "heun")
    # Ours: the noise of step i + 1 belongs to the last update of step i, that of step 0 is part of the initial noise.
    first = math.sqrt(max(plan.init_scale**2 - sigmas[0] ** 2, 0.0))
    owners = [u.step for u in plan.updates]
    drawn = [noises[step + 1] if step + 1 < steps else unit for step in owners]
    remaining = iter(plan.updates)
    ours = run(
        plan,
        unit * sigmas[0] + first * noises[0],
        lambda x, _: network(x, 100.0 * math.log(next(remaining).sigma)),
        drawn,
    )
    assert plan.init_scale >= sigmas[0]
    assert worst([ours[-1]], [exact]) <= 1e-12


def test_churn_tells_the_network_the_raised_level() -> None:
    plain = make_plan(CONFIG, steps=10, sampler="euler")
    churned = make_plan(CONFIG, steps=10, sampler="euler", s_churn=3.0)
    ratios = [a.sigma / b.sigma for a, b in zip(churned.updates, plain.updates, strict=True)]
    assert ratios == pytest.approx([1.3] * 10, rel=1e-12)
    assert all(a.timestep > b.timestep for a, b in zip(churned.updates[1:], plain.updates[1:], strict=True))
    assert churned.init_scale == pytest.approx(1.3 * plain.init_scale)
    assert churned.table()[-1, Column.S] == 0.0
