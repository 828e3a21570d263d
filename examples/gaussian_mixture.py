"""Points of a two-dimensional mixture of Gaussians, whose score is known: several samplers side by side, in one batch.

    python -m stepfuse.examples.gaussian_mixture [-o gaussian_mixture.png]

Prints how far mean, covariance, and shares and widths of the components are from the truth. Needs the extra `bench`.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch
from torch import Tensor

from stepfuse import Engine

POINTS = 4000
DEVIATION = 0.12
ANGLES = torch.arange(7) * (2 * math.pi / 7)
MEANS = torch.cat([torch.stack([2 * ANGLES.cos(), 2 * ANGLES.sin()], 1), torch.zeros(1, 2)])
WEIGHTS = torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0, 2.0, 1.0, 3.0]) / 13
RUNS = (
    ("dpmpp_2m", {"steps": 10}),
    ("dpmpp_2m", {"steps": 30}),
    ("euler", {"steps": 30, "schedule": "karras"}),
    ("heun", {"steps": 30, "schedule": "karras"}),
    ("ddim", {"steps": 50}),
    ("euler_a", {"steps": 200}),
    ("ddpm", {"steps": 200}),
)


def score(x: Tensor, sigma: Tensor) -> Tensor:
    """grad log p of points x [R, P, 2] = (x0 + sigma eps) / sqrt(1 + sigma^2), x0 of the mixture; sigma: [R]."""
    s = sigma[:, None, None]
    norm = torch.sqrt(1 + s * s)
    variance = (DEVIATION**2 + s * s) / norm**2
    offset = x[:, :, None] - MEANS / norm[..., None]  # [R, P, K, 2]
    share = (WEIGHTS.log() - offset.square().sum(-1) / (2 * variance)).softmax(-1)
    return -(share[..., None] * offset).sum(2) / variance


def main() -> int:
    """Sample, compare, draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("gaussian_mixture.png"), help="PNG to write")
    arguments = parser.parse_args()
    with Engine.from_module(score, (POINTS, 2), prediction="score", time="sigma", device="cpu") as engine:
        jobs = [engine.submit(seed=0, sampler=sampler, **options) for sampler, options in RUNS]
        clouds = [job.result().images[0] for job in jobs]
    names = [f"{sampler}, {options['steps']} steps" + ", karras" * ("schedule" in options) for sampler, options in RUNS]
    for name, points in {"exact": exact(), **dict(zip(names, clouds, strict=True))}.items():
        mean, covariance, shares, width = errors(points)
        sys.stdout.write(
            f"{name:<28} mean {mean:.3f}  covariance {covariance:.3f}  shares {shares:.3f}  width x {width:.2f}\n"
        )
    draw([("exact", exact()), *zip(names, clouds, strict=True)], arguments.output)
    return 0


def exact() -> Tensor:
    """As many points of the mixture itself [P, 2]: what chance alone leaves of errors."""
    generator = torch.Generator().manual_seed(1)
    chosen = torch.multinomial(WEIGHTS, POINTS, replacement=True, generator=generator)
    return MEANS[chosen] + DEVIATION * torch.randn(POINTS, 2, generator=generator)


def errors(points: Tensor) -> tuple[float, float, float, float]:
    """Largest errors of the mean, of the covariance and of the share of a component; the median distance from the
    nearest mean, over what it should be.
    """
    mean = WEIGHTS @ MEANS
    covariance = (WEIGHTS[:, None] * MEANS).T @ MEANS - mean[:, None] * mean + DEVIATION**2 * torch.eye(2)
    distance, nearest = torch.cdist(points, MEANS).min(1)
    found = nearest.bincount(minlength=len(MEANS)) / len(points)
    wrong = (points.mean(0) - mean, torch.cov(points.T) - covariance, found - WEIGHTS)
    first, second, third = (float(one.abs().max()) for one in wrong)
    return first, second, third, float(distance.median()) / (DEVIATION * math.sqrt(2 * math.log(2)))


def draw(clouds: list[tuple[str, Tensor]], output: Path) -> None:
    """One panel per sampler."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, 4, figsize=(10, 5.4), sharex=True, sharey=True)
    for panel, (name, points) in zip(panels.flat, clouds, strict=True):
        panel.plot(points[::2, 0], points[::2, 1], ".", markersize=1.5, color="0.3" if name == "exact" else "tab:blue",
                   markeredgewidth=0)  # fmt: skip
        panel.set_title(name, fontsize=9)
        panel.set(xlim=(-2.8, 2.8), ylim=(-2.8, 2.8), aspect="equal")
    figure.tight_layout()
    figure.savefig(output, dpi=80)


if __name__ == "__main__":
    raise SystemExit(main())
