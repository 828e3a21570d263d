"""Running a plan through the reference op, and networks whose answers are known."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from stepfuse.engine.sampling.limits import limits, raw_estimate
from stepfuse.engine.sampling.update import Plan
from stepfuse.kernels.sampler_step.reference import sampler_step

SHAPE = (1, 2, 3, 5)


def network(x: Tensor, timestep: float) -> Tensor:
    """A smooth function of the scaled input and the timestep, so that both are tested too."""
    return 0.7 * torch.tanh(0.8 * x + 0.3 * math.sin(0.01 * timestep)) + 0.2 * torch.cos(x.roll(1, -1))


def draw(count: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


def run(
    plan: Plan, x: Tensor, call: Callable[[Tensor, float], Tensor], noises: Sequence[Tensor] = (), **options: Any
) -> list[Tensor]:
    """The state after every update, from x (already scaled), one row; `options` are more arguments of the op.

    With the limits of a dynamic threshold, where the plan has one.
    """
    dynamic = plan.dynamic_threshold
    table = torch.from_numpy(plan.table()).to(x.dtype).unsqueeze(0)
    base, history = torch.zeros_like(x), torch.zeros(1, 3, *x.shape[1:], dtype=x.dtype)
    model_input, states = plan.updates[0].c_in * x, []
    weights, seeds = torch.ones(1, 1, dtype=x.dtype), torch.zeros(1, dtype=torch.int64)
    for i, timestep in enumerate(plan.timesteps):
        output = call(model_input, timestep).unsqueeze(1)
        noise = torch.stack((noises[i], noises[i - 1]), 1) if noises else torch.zeros(1, 2, *x.shape[1:], dtype=x.dtype)
        position = torch.tensor([i])
        if dynamic is not None:
            raw = raw_estimate(x, output[:, :, : x.shape[1]], weights, table[:, i])
            options["limit"] = limits(raw, torch.tensor([[dynamic.percentile, dynamic.most]], dtype=torch.float64))
        x, base, history, model_input, bad = sampler_step(
            x, base, history, output, table, position, weights, seeds, extra_noise=noise, **options
        )
        assert not bad.any()
        states.append(x.double())
    return states


def worst(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """Largest relative difference over a trajectory."""
    assert len(ours) == len(theirs)
    pairs = zip(ours, theirs, strict=True)
    return max(float((a - b).abs().max() / max(1.0, float(b.square().mean().sqrt()))) for a, b in pairs)


class Exact:
    """A network that knows the denoiser: F with p x + q F = denoise(x, alpha, sigma) at every update of a plan."""

    def __init__(self, plan: Plan, denoise: Callable[[Tensor, float, float], Tensor]) -> None:
        self.updates = iter(plan.updates)
        self.denoise = denoise

    def __call__(self, model_input: Tensor, timestep: float) -> Tensor:
        u = next(self.updates)
        assert u.timestep == timestep
        x = model_input / u.c_in
        return (self.denoise(x, u.alpha, u.sigma) - u.p * x) / u.q


class Mixture:
    """The exact denoiser of a mixture of isotropic Gaussians over the channel axis: E[x0 | x]."""

    def __init__(self, components: int, dim: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.means = 1.2 * torch.randn(components, dim, generator=generator, dtype=torch.float64)
        self.variances = 0.25 + 0.5 * torch.rand(components, generator=generator, dtype=torch.float64)

    def __call__(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        points = x.movedim(1, -1).unsqueeze(-2)  # [1, H, W, 1, C]
        total = alpha**2 * self.variances + sigma**2  # [K]
        away = points - alpha * self.means
        log_weight = -0.5 * away.square().sum(-1) / total - 0.5 * x.shape[1] * total.log()
        estimates = self.means + (alpha * self.variances / total).unsqueeze(-1) * away
        return (log_weight.softmax(-1).unsqueeze(-1) * estimates).sum(-2).movedim(-1, 1)
