"""Noise schedules: beta tables, spaced timesteps, sigma schedules. Pure functions in float64, no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ..errors import RequestError, closest
from .beta_quantile import beta_quantile
from .sampler_options import SamplerOptions
from .scheduler_config import SchedulerConfig
from .update import Level

__all__ = [
    "NoiseSchedule",
    "SamplerOptions",
    "SchedulerConfig",
    "beta_sigmas",
    "beta_table",
    "exponential_sigmas",
    "karras_sigmas",
    "rescale_zero_terminal_snr",
    "spaced_timesteps",
]

Array = NDArray[np.float64]

# Smallest positive half-precision number: where a zero-terminal-SNR table meets a sampler that divides by alpha,
# the ecosystem ends the table here (sigma 4096) instead of at infinity.
_SMALLEST_ALPHA_BAR = 2.0**-24


def beta_table(kind: str, start: float, end: float, count: int) -> Array:
    """Betas of `count` training steps.

    linear (Ho et al. 2020), scaled_linear (latent diffusion: linear in sqrt), squaredcos_cap_v2 (Nichol & Dhariwal
    2021), sigmoid (GeoDiff), laplace, exp. Only the first two and sigmoid use `start` and `end`.
    """
    if kind == "linear":
        return np.linspace(start, end, count, dtype=np.float64)
    if kind == "scaled_linear":
        return np.square(np.linspace(start**0.5, end**0.5, count, dtype=np.float64))
    if kind == "sigmoid":
        return (end - start) / (1.0 + np.exp(-np.linspace(-6.0, 6.0, count))) + start
    bar = {"squaredcos_cap_v2": _cosine_bar, "laplace": _laplace_bar, "exp": _exponential_bar}[kind]
    values = np.array([bar(i / count) for i in range(count + 1)])
    return np.minimum(1.0 - values[1:] / values[:-1], 0.999)


def _cosine_bar(t: float) -> float:
    return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2


def _exponential_bar(t: float) -> float:
    return math.exp(-12.0 * t)


def _laplace_bar(t: float) -> float:
    lam = -0.5 * math.copysign(1.0, 0.5 - t) * math.log(1.0 - 2.0 * abs(0.5 - t) + 1e-6)
    return math.sqrt(math.exp(lam) / (1.0 + math.exp(lam)))


def rescale_zero_terminal_snr(alphas_cumprod: Array) -> Array:
    """Shift and scale sqrt(alpha_bar) so that its last value is exactly 0 (Lin et al. 2023, algorithm 1)."""
    root = np.sqrt(alphas_cumprod)
    return ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """The training noise: alpha_bar of every integer timestep, float64 [T]."""

    alphas_cumprod: Array

    @classmethod
    def from_options(cls, options: SamplerOptions) -> NoiseSchedule:
        """The table a checkpoint was trained with."""
        o = options
        return _table(
            o.beta_schedule, o.beta_start, o.beta_end, o.num_train_timesteps, o.trained_betas, o.rescale_betas_zero_snr
        )

    @property
    def count(self) -> int:
        """Training timesteps T."""
        return len(self.alphas_cumprod)

    @property
    def sigmas(self) -> Array:
        """sigma / alpha of every timestep, ascending, finite."""
        bar = self.alphas_cumprod
        if bar[-1] == 0.0:
            bar = np.append(bar[:-1], _SMALLEST_ALPHA_BAR)
        return np.sqrt((1.0 - bar) / bar)

    def level(self, timestep: int) -> Level:
        """The variance preserving level of an integer timestep (alpha^2 + sigma^2 = 1)."""
        bar = float(self.alphas_cumprod[timestep])
        return Level(math.sqrt(bar), math.sqrt(1.0 - bar), float(timestep))

    def sigma_at(self, timesteps: Array) -> Array:
        """sigma / alpha at fractional timesteps, linear in sigma between table entries."""
        return np.interp(timesteps, np.arange(self.count), self.sigmas)

    def timestep_of(self, sigma: float) -> float:
        """The fractional timestep of a sigma, linear in ln(sigma), clipped to the table (k-diffusion `sigma_to_t`)."""
        return float(np.interp(math.log(max(sigma, 1e-10)), np.log(self.sigmas), np.arange(self.count)))


@lru_cache(maxsize=32)
def _table(
    kind: str, start: float, end: float, count: int, trained: tuple[float, ...] | None, zero_snr: bool
) -> NoiseSchedule:
    betas = np.array(trained, dtype=np.float64) if trained is not None else beta_table(kind, start, end, count)
    bar: Array = np.cumprod(1.0 - betas, dtype=np.float64)
    bar = rescale_zero_terminal_snr(bar) if zero_snr else bar
    bar.setflags(write=False)
    return NoiseSchedule(bar)


def spaced_timesteps(
    spacing: str,
    steps: int,
    count: int,
    *,
    offset: int = 0,
    rounded: bool = True,
    points: int | None = None,
    stride: float | None = None,
) -> Array:
    """Descending timesteps of `steps` steps over `count` training steps (Lin et al. 2023, table 2).

    leading   i * (count // points) + offset, i = points-1 ... ; trailing  round(count - i * stride) - 1 ;
    linspace  from count-1 to 0. `points` (default `steps`) is how many points leading and linspace are laid out for;
    the first `steps` are returned. `stride` defaults to count / steps. `rounded` rounds linspace to integers.

    diffusers' trailing returns one timestep too many, -1, for 62 of the step counts up to 1000 (61 is the first): an
    artefact of a floating point range. It is left out here.
    """
    points = steps if points is None else points
    if spacing == "linspace":
        t = np.linspace(0, count - 1, points)
        t = np.round(t) if rounded else t
        return t[::-1][:steps].copy()
    if spacing == "leading":
        if count < points:
            raise RequestError(f"steps={steps} with schedule 'leading' on {count} training steps; use fewer steps")
        t = np.arange(points, dtype=np.float64)[::-1][:steps] * (count // points) + offset
        if t[0] >= count:
            raise RequestError(
                f"steps={steps} with steps_offset={offset} asks for timestep {t[0]:.0f}, but the model was trained on "
                f"0..{count - 1}; use fewer steps or schedule='trailing'"
            )
        return t
    if spacing == "trailing":
        return (np.round(np.arange(count, 0, -(stride or count / steps))) - 1)[:steps]
    raise RequestError(f"unknown timestep spacing {spacing!r}; {closest(spacing, ('leading', 'trailing', 'linspace'))}")


def karras_sigmas(steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Array:
    """Karras et al. 2022, equation 5: uniform in sigma^(1/rho), descending from sigma_max to sigma_min."""
    ramp = np.linspace(0.0, 1.0, steps)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return (high + ramp * (low - high)) ** rho


def exponential_sigmas(steps: int, sigma_min: float, sigma_max: float) -> Array:
    """Uniform in ln(sigma), descending (also the uniform-lambda schedule of Lu et al. 2022)."""
    return np.exp(np.linspace(math.log(sigma_max), math.log(sigma_min), steps))


def beta_sigmas(steps: int, sigma_min: float, sigma_max: float, a: float = 0.6, b: float = 0.6) -> Array:
    """Quantiles of Beta(a, b) spread over [sigma_min, sigma_max], descending (Lee et al. 2024, as in diffusers)."""
    quantiles = np.array([beta_quantile(float(u), a, b) for u in 1.0 - np.linspace(0.0, 1.0, steps)])
    return sigma_min + quantiles * (sigma_max - sigma_min)


SIGMA_FUNCTIONS = {
    "karras": karras_sigmas,
    "exponential": exponential_sigmas,
    "beta": beta_sigmas,
    "lu": exponential_sigmas,
}
