"""The noise levels a sampler visits, from a checkpoint's scheduler options: one function per state space. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..errors import RequestError
from .sampler_options import SamplerOptions
from .schedules import SIGMA_FUNCTIONS, Array, NoiseSchedule, exponential_sigmas, spaced_timesteps
from .update import Level

_CLEAN = Level(1.0, 0.0, 0.0)


@dataclass(frozen=True)
class Levels:
    """The levels a sampler visits: evaluate at `at[i]`, arrive at `to[i]`.

    `to[i]` is `at[i+1]` except where a sampler's own grid says otherwise (DDIM steps by count // steps). `scaled_input`
    marks the variance exploding state (alpha = 1), whose network input is x / sqrt(sigma^2 + 1). Sampling from pure
    noise starts at x = init_scale * unit noise. `final` is where a step below timestep 0 arrives. `start` steps of the
    whole schedule come before these, `left` steps after them.
    """

    at: tuple[Level, ...]
    to: tuple[Level, ...]
    schedule: NoiseSchedule
    final: Level = _CLEAN
    init_scale: float = 1.0
    scaled_input: bool = False
    start: int = 0
    left: int = 0

    @property
    def total(self) -> int:
        """Steps of the whole schedule, skipped ones included."""
        return self.start + len(self.at) + self.left

    def part(self, start: int, stop: int) -> Levels:
        """Steps `start` to `stop` (excluded) of these levels."""
        left = self.left + len(self.at) - stop
        return replace(self, at=self.at[start:stop], to=self.to[start:stop], start=self.start + start, left=left)

    def c_in(self, sigma: float) -> float:
        """What the state at `sigma` is multiplied by before the network sees it."""
        return 1.0 / math.hypot(sigma, 1.0) if self.scaled_input else 1.0


def preserving_levels(o: SamplerOptions, steps: int, *, sigmas: Sequence[float] | None, stride: int | None) -> Levels:
    """DDIM, DDPM, PNDM: alpha^2 + sigma^2 = 1 at integer timesteps, or at given or scheduled sigmas.

    `stride` (DDIM, PNDM: count // steps) is how far each step goes; None goes to the next timestep of the grid.
    """
    schedule = NoiseSchedule.from_options(o)
    final = _CLEAN if o.set_alpha_to_one else schedule.level(0)
    if sigmas is not None or o.sigma_schedule:
        given = _given(sigmas) if sigmas is not None else np.append(_scheduled(o, steps, schedule.sigmas), 0.0)
        at = tuple(_preserving(float(s), schedule.timestep_of(float(s))) for s in given[:-1])
        return Levels(at, (*at[1:], _preserving(float(given[-1]), schedule.timestep_of(float(given[-1])))), schedule)
    grid = [int(t) for t in _spaced(o, steps, schedule)]
    at = tuple(schedule.level(t) for t in grid)
    if stride is None:
        return Levels(at, (*at[1:], final), schedule, final)
    to = tuple(schedule.level(t - stride) if t >= stride else final for t in grid)
    return Levels(at, to, schedule, final)


def exploding_levels(o: SamplerOptions, steps: int, *, sigmas: Sequence[float] | None, sampler: str) -> Levels:
    """Euler, Euler ancestral, Heun, LMS: alpha = 1, x = x0 + sigma eps, fractional timesteps (k-diffusion)."""
    schedule = NoiseSchedule.from_options(o)
    table = schedule.sigmas
    last = float(table[0]) if o.final_sigmas_type == "sigma_min" else 0.0
    if sigmas is not None:
        given = _given(sigmas)
        values, last = given[:-1], float(given[-1])
        timesteps = np.array([schedule.timestep_of(float(s)) for s in values])
    else:
        timesteps = _spaced(o, steps, schedule, rounded=False)
        values = schedule.sigma_at(timesteps)
        if o.interpolation_type == "log_linear":
            grid = exponential_sigmas(steps + 1, float(table[0]), float(table[-1]))
            values, last = (grid, last) if o.sigma_schedule else (grid[:steps], float(grid[steps]))
        if o.sigma_schedule:
            # diffusers' LMS alone does not read sigma_min and sigma_max for karras.
            o_ends = (
                replace(o, sigma_min=None, sigma_max=None) if (sampler, o.sigma_schedule) == ("lms", "karras") else o
            )
            values = _scheduled(o_ends, steps, values[::-1])
            timesteps = np.array([schedule.timestep_of(float(s)) for s in values])
    if o.timestep_type == "continuous" and o.prediction_type == "v_prediction":
        timesteps = 0.25 * np.log(values)  # EDM's c_noise, for networks fine-tuned to it
    at = tuple(Level(1.0, float(s), float(t)) for s, t in zip(values, timesteps, strict=True))
    to = (*at[1:], Level(1.0, last, schedule.timestep_of(last)))
    top = max(float(values.max()), last)
    # Exact noise at sigma_max is hypot(sigma_max, signal); "leading" starts below the last training step and adds it.
    scale = top if o.timestep_spacing in ("linspace", "trailing") else math.hypot(top, 1.0)
    return Levels(at, to, schedule, init_scale=scale, scaled_input=True)


def dpm_levels(o: SamplerOptions, steps: int, *, sigmas: Sequence[float] | None) -> Levels:
    """DPM-Solver++: variance preserving levels of k-diffusion sigmas, integer timesteps (as diffusers rounds them)."""
    schedule = NoiseSchedule.from_options(o)
    table = schedule.sigmas
    last = float(table[0]) if o.final_sigmas_type == "sigma_min" else 0.0
    if sigmas is not None:
        given = _given(sigmas)
        values, last = given[:-1], float(given[-1])
        timesteps = np.array([schedule.timestep_of(float(s)) for s in values])
    elif o.sigma_schedule:
        values = _scheduled(o, steps, table)
        timesteps = np.array([schedule.timestep_of(float(s)) for s in values])
        if o.sigma_schedule in ("karras", "lu") and o.beta_schedule != "squaredcos_cap_v2":
            timesteps = np.round(timesteps)
        timesteps = np.trunc(timesteps)
    else:
        # lambda = -ln(sigma / alpha); the table is cut where it falls below lambda_min_clipped.
        usable = int(np.count_nonzero(-np.log(table) >= o.lambda_min_clipped))
        timesteps = spaced_timesteps(
            o.timestep_spacing,
            steps,
            usable,
            offset=o.steps_offset,
            points=steps + 1,
            stride=schedule.count / steps,
        )
        values = schedule.sigma_at(timesteps)
    at = tuple(_preserving(float(s), float(t)) for s, t in zip(values, timesteps, strict=True))
    return Levels(at, (*at[1:], _preserving(last, schedule.timestep_of(last))), schedule)


def lcm_levels(o: SamplerOptions, steps: int) -> Levels:
    """Latent consistency models: `steps` of the `original_inference_steps` timesteps used in distillation."""
    schedule = NoiseSchedule.from_options(o)
    original = o.original_inference_steps
    if original > schedule.count or steps > original:
        raise RequestError(
            f"steps={steps} with sampler 'lcm' and original_inference_steps={original} of {schedule.count} training "
            f"steps; use at most {min(original, schedule.count)} steps"
        )
    distilled = (np.arange(1, original + 1) * (schedule.count // original) - 1)[::-1]
    picks = np.floor(np.linspace(0, original, num=steps, endpoint=False)).astype(np.int64)
    at = tuple(schedule.level(int(t)) for t in distilled[picks])
    return Levels(at, (*at[1:], _CLEAN), schedule)


def _spaced(o: SamplerOptions, steps: int, schedule: NoiseSchedule, *, rounded: bool = True) -> Array:
    return spaced_timesteps(o.timestep_spacing, steps, schedule.count, offset=o.steps_offset, rounded=rounded)


def _scheduled(o: SamplerOptions, steps: int, ascending: Array) -> Array:
    """The sigma schedule between the ends of `ascending`, or between sigma_min and sigma_max where they are set."""
    low = o.sigma_min if o.sigma_min is not None else float(ascending[0])
    high = o.sigma_max if o.sigma_max is not None else float(ascending[-1])
    return SIGMA_FUNCTIONS[str(o.sigma_schedule)](steps, low, high)


def _given(sigmas: Sequence[float]) -> Array:
    values = np.asarray(sigmas, dtype=np.float64)
    ok = values.ndim == 1 and len(values) >= 2 and bool(np.isfinite(values).all()) and values[-1] >= 0.0
    if not (ok and bool((np.diff(values) < 0.0).all())):
        raise RequestError(
            f"sigmas={list(sigmas)!r}; expected at least two finite, strictly descending numbers, ending at 0"
        )
    return values


def _preserving(sigma: float, timestep: float) -> Level:
    """x = alpha (x0 + sigma eps) with alpha = 1 / sqrt(1 + sigma^2)."""
    alpha = 1.0 / math.hypot(1.0, sigma)
    return Level(alpha, sigma * alpha, timestep)
