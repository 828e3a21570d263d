"""One-dimensional paths of any length, from a Gaussian process whose denoiser is known; start and goal kept by a mask.

    python -m stepfuse.examples.trajectories [-o trajectories.png]

Prints how far paths through a fixed start and goal are from the process's own conditional distribution, with and
without resampling (RePaint). Needs the extra `bench`.
"""

from __future__ import annotations

import argparse
import sys
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from stepfuse import Engine

LENGTH = 64
SCALE = 12.0  # positions over which a path forgets where it was
ENDS = (-1.5, 1.5)
PATHS = 128
STEPS = 100
RESAMPLE = (10, 10)
PANELS = ("free, three lengths", "start and goal kept", "start and goal kept, resampled")


def covariance(length: int) -> Tensor:
    """float64 [length, length]: of a Gaussian process with a squared exponential kernel, a little rough."""
    at = torch.arange(length, dtype=torch.float64)
    return torch.exp(-((at[:, None] - at) ** 2) / (2 * SCALE**2)) + 1e-3 * torch.eye(length, dtype=torch.float64)


@cache
def spectrum(length: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues [length] and eigenvectors of the covariance."""
    values, vectors = torch.linalg.eigh(covariance(length))
    return values.float(), vectors.float()


def denoise(x: Tensor, sigma: Tensor) -> Tensor:
    """E[x0 | x] of paths x [R, length] = (x0 + sigma eps) / sqrt(1 + sigma^2); sigma: [R]."""
    values, vectors = spectrum(x.shape[1])
    s = sigma[:, None]
    return (torch.sqrt(1 + s * s) * (x @ vectors) * (values / (values + s * s))) @ vectors.T


def main() -> int:
    """Sample, compare, draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("trajectories.png"), help="PNG to write")
    arguments = parser.parse_args()
    known, mask = torch.zeros(1, LENGTH), torch.ones(LENGTH)
    known[0, [0, -1]], mask[[0, -1]] = torch.tensor(ENDS), 0.0
    kept = {"image": known, "mask": mask, "n": PATHS, "steps": STEPS, "sampler": "euler_a", "seed": 0}
    with Engine.from_module(
        denoise, (None,), prediction="sample", time="sigma", device="cpu", max_rows=PATHS
    ) as engine:
        jobs = [engine.submit(shape=(length,), n=2, seed=length) for length in (32, LENGTH, 96)]
        jobs += [engine.submit(**kept), engine.submit(**kept, resample=RESAMPLE)]
        *free, replaced, resampled = [job.result().images for job in jobs]
    mean, deviation = conditional()
    exact = float(((mean[1] - ENDS[0]) ** 2 + deviation[0] ** 2).sqrt())
    for name, paths in (("replaced", replaced), ("resampled", resampled)):
        ends = float((paths - known)[:, [0, -1]].abs().max())
        off = float((paths.mean(0) - mean).abs().max())
        ratio = float((paths.var(0)[1:-1].mean() / deviation.square().mean()).sqrt())
        step = float((paths[:, 1] - paths[:, 0]).square().mean().sqrt())
        sys.stdout.write(f"{name:<10} ends off by {ends}, mean by up to {off:.2f}, deviation {ratio:.2f} of the exact, "
                         f"first step {step:.2f} (exact {exact:.2f})\n")  # fmt: skip
    draw([paths for rows in free for paths in rows], [replaced, resampled], arguments.output)
    return 0


def conditional() -> tuple[Tensor, Tensor]:
    """Mean [LENGTH] of the process through start and goal, and its deviation between them [LENGTH - 2]."""
    whole = covariance(LENGTH)
    gain = whole[:, [0, -1]] @ torch.linalg.inv(whole[[0, -1]][:, [0, -1]])
    left = whole - gain @ whole[[0, -1]]
    return (gain @ torch.tensor(ENDS, dtype=torch.float64)).float(), left.diagonal()[1:-1].sqrt().float()


def draw(free: list[Tensor], kept: list[Tensor], output: Path) -> None:
    """Paths without ends, then paths with ends over the exact band of two deviations."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(11, 3.4), sharey=True)
    for path in free:
        panels[0].plot(path, linewidth=1)
    mean, deviation = conditional()
    low, high = mean[1:-1] - 2 * deviation, mean[1:-1] + 2 * deviation
    for panel, paths in zip(panels[1:], kept, strict=True):
        panel.fill_between(range(1, LENGTH - 1), low, high, color="0.9", label="exact, two deviations")
        panel.plot(paths[:12].T, linewidth=0.8)
        panel.plot([0, LENGTH - 1], ENDS, "ko", markersize=5)
    for panel, title in zip(panels, PANELS, strict=True):
        panel.set(title=title, xlabel="position", ylim=(-3.6, 3.6))
    panels[1].legend(loc="lower right", fontsize=8)
    figure.tight_layout()
    figure.savefig(output, dpi=80)


if __name__ == "__main__":
    raise SystemExit(main())
