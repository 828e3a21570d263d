"""From a checkpoint's scheduler and a request's sampler options to a `Plan`. No torch."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from ..errors import RequestError, closest
from .dynamic_threshold import DynamicThreshold
from .levels import Levels, dpm_levels, exploding_levels, lcm_levels, preserving_levels
from .names import CLASS_NAMES, SAMPLERS, SIGMA_SCHEDULES, SPACINGS, resolve_sampler, resolve_schedule
from .planners.dpmpp import Solver, plan_dpmpp
from .planners.edm import Churn, plan_euler, plan_heun
from .planners.first_order import plan_ddim, plan_ddpm, plan_euler_ancestral, plan_lcm
from .planners.lms import plan_lms
from .planners.pndm import plan_pndm
from .portion import Portion
from .predictions import denoised_coefficients
from .sampler_options import SamplerOptions
from .scheduler_config import SchedulerConfig
from .update import Plan, Update

CORRECTIONS = ("next_timestep",)
"""Corrections of published behaviour that `compat=` can ask for.

next_timestep   DDIM steps to the next timestep of its grid instead of down by num_train_timesteps // steps. No change
                for "leading". For "linspace", and for "trailing" where the steps do not divide the training steps,
                diffusers arrives off the grid it evaluates on (relative error 0.08 at 20 and 0.045 at 13 steps on a
                Gaussian mixture).
"""

HONOURS = {
    "eta": ("ddim", "euler_a"),
    "s_churn": ("euler", "heun"),
    "sigmas": tuple(s for s in SAMPLERS if s not in ("pndm", "lcm")),
    "schedule": tuple(s for s in SAMPLERS if s != "lcm"),
    "next_timestep": ("ddim",),
}
"""Option -> the samplers that act on it. `schedule` in SIGMA_SCHEDULES goes with `sigmas`."""


def make_plan(
    config: SchedulerConfig,
    *,
    steps: int,
    sampler: str | None = None,
    schedule: str | None = None,
    eta: float | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    sigmas: Sequence[float] | None = None,
    start: int = 0,
    strength: float | None = None,
    denoising_start: float | None = None,
    denoising_end: float | None = None,
    dynamic_threshold: float | tuple[float, float] | None = None,
    compat: Collection[str] = (),
) -> Plan:
    """The table of `steps` steps of a sampler on a checkpoint.

    sampler   a name of `names.SAMPLERS`, an alias or a diffusers class name; None: the checkpoint's own
    schedule  a name of `names.SCHEDULES`, replacing the checkpoint's spacing or sigma schedule; None: keep it
    eta       ddim (default 0), euler_a (default 1): share of the posterior noise that is drawn, 0 to 1
    s_*       churn of euler and heun (Karras et al. 2022, algorithm 2)
    sigmas    the sigma / alpha of every level, descending, the final one included: `steps` + 1 numbers
    start, strength, denoising_start, denoising_end
              which of the steps to run, see `Portion`; the history starts empty
    dynamic_threshold
              p or (p, largest threshold) of `DynamicThreshold`, 0: none; None: as the checkpoint says
    compat    corrections of published behaviour, see `CORRECTIONS`

    Raises RequestError for what the request gets wrong, an option the sampler does not honour included, and
    CheckpointError for what the checkpoint's scheduler asks for and stepfuse does not do.
    """
    name = _sampler_name(config, sampler)
    _check_numbers(steps, eta, s_churn, s_tmin, s_tmax, s_noise)
    portion = Portion(start=start, strength=strength, denoising_start=denoising_start, denoising_end=denoising_end)
    _check_honoured(name, schedule, eta, (s_churn, s_tmin, s_tmax, s_noise), sigmas, compat)
    options = config.resolve(name, **_schedule_overrides(schedule))
    if sigmas is not None and len(sigmas) != steps + 1:
        raise RequestError(
            f"got {len(sigmas)} sigmas for steps={steps}; expected {steps + 1}, the final one (0) included"
        )
    if sigmas is None and steps > options.num_train_timesteps:
        raise RequestError(
            f"steps={steps}; the checkpoint was trained on {options.num_train_timesteps}, use at most those"
        )
    whole = _levels(name, options, steps, sigmas, compat)
    levels, churn = portion.of(whole), Churn(s_churn, s_tmin, s_tmax, s_noise)
    dynamic = DynamicThreshold.of(dynamic_threshold, options)
    clamp = options.clip_sample_range if options.clip_sample and dynamic is None else math.inf
    updates, churned = _updates(name, levels, options, eta, churn, clipped=dynamic is not None or clamp < math.inf)
    image, noise = portion.initial(levels)
    return Plan(
        updates=tuple(_complete(u, levels, options.prediction_type, clamp) for u in updates),
        init_scale=math.hypot(noise, churned),
        init_alpha=image,
        steps=steps,
        sampler=name,
        schedule=_schedule_name(name, options, sigmas),
        prediction_type=options.prediction_type,
        arrivals=(*churn.raised(levels)[0][1:], levels.to[-1]) if churn.amount else levels.to,
        cut=whole.at[steps - levels.left] if levels.left else None,
        dynamic_threshold=dynamic,
    )


def _levels(
    name: str, options: SamplerOptions, steps: int, sigmas: Sequence[float] | None, compat: Collection[str]
) -> Levels:
    if name in ("euler", "euler_a", "heun", "lms"):
        return exploding_levels(options, steps, sigmas=sigmas, sampler=name)
    if name == "dpmpp_2m":
        return dpm_levels(options, steps, sigmas=sigmas)
    if name == "lcm":
        return lcm_levels(options, steps)
    fixed = name == "pndm" or (name == "ddim" and "next_timestep" not in compat)
    stride = options.num_train_timesteps // steps if fixed and sigmas is None else None
    return preserving_levels(options, steps, sigmas=sigmas, stride=stride)


def _updates(
    name: str, levels: Levels, options: SamplerOptions, eta: float | None, churn: Churn, *, clipped: bool
) -> tuple[list[Update], float]:
    """The solver's updates, and the churn that merges with the initial noise."""
    if name == "euler":
        return plan_euler(levels, churn=churn)
    if name == "heun":
        return plan_heun(levels, churn=churn)
    if name == "ddim":
        return plan_ddim(levels, eta=0.0 if eta is None else eta, clipped=clipped), 0.0
    if name == "ddpm":
        return plan_ddpm(levels, variance=options.variance_type or "fixed_small"), 0.0
    if name == "euler_a":
        return plan_euler_ancestral(levels, eta=1.0 if eta is None else eta), 0.0
    if name == "lms":
        return plan_lms(levels), 0.0
    if name == "lcm":
        return plan_lcm(levels, timestep_scaling=options.timestep_scaling), 0.0
    if name == "pndm":
        return plan_pndm(levels, options.prediction_type, skip_prk_steps=options.skip_prk_steps), 0.0
    solver = Solver(
        order=options.solver_order,
        kind="heun" if options.solver_type == "heun" else "midpoint",
        sde=options.algorithm_type == "sde-dpmsolver++",
        lower_order_final=options.lower_order_final,
        euler_at_final=options.euler_at_final,
    )
    return plan_dpmpp(levels, solver=solver), 0.0


def _complete(update: Update, levels: Levels, prediction: str, clamp: float) -> Update:
    """What every sampler shares: how the network is fed and how its output is read."""
    p, q = denoised_coefficients(prediction, update.alpha, update.sigma)
    return replace(update, c_in=levels.c_in(update.sigma), p=p, q=q, clamp=clamp)


def _sampler_name(config: SchedulerConfig, sampler: str | None) -> str:
    if sampler is not None:
        return resolve_sampler(sampler)
    if config.sampler is None:
        raise RequestError(
            f"the checkpoint's sampler {config.class_name} is not available; choose one with sampler=, "
            f"for example 'dpmpp_2m' ({closest(config.class_name, SAMPLERS)})"
        )
    return config.sampler


def _schedule_name(name: str, options: SamplerOptions, sigmas: Sequence[float] | None) -> str:
    if sigmas is not None:
        return "sigmas"
    if name == "lcm":
        return "distilled"  # a subset of the timesteps it was distilled on, whatever the spacing says
    return options.sigma_schedule or options.timestep_spacing


def _schedule_overrides(schedule: str | None) -> dict[str, Any]:
    if schedule is None:
        return {}
    name = resolve_schedule(schedule)
    flags = {"karras": "use_karras_sigmas", "exponential": "use_exponential_sigmas", "beta": "use_beta_sigmas"}
    flags["lu"] = "use_lu_lambdas"
    overrides: dict[str, Any] = {flag: key == name for key, flag in flags.items()}
    return overrides | ({"timestep_spacing": name} if name in SPACINGS else {})


def _check_numbers(steps: int, eta: float | None, s_churn: float, s_tmin: float, s_tmax: float, s_noise: float) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise RequestError(f"steps={steps!r}; expected an integer of at least 1")
    if eta is not None and not 0.0 <= eta <= 1.0:
        raise RequestError(f"eta={eta!r}; expected a number from 0 to 1")
    for label, value in (("s_churn", s_churn), ("s_tmin", s_tmin), ("s_tmax", s_tmax), ("s_noise", s_noise)):
        if not value >= 0.0 or (label in ("s_churn", "s_noise") and math.isinf(value)):
            raise RequestError(f"{label}={value!r}; expected a number of at least 0")


def _check_honoured(
    name: str,
    schedule: str | None,
    eta: float | None,
    churn: tuple[float, float, float, float],
    sigmas: Sequence[float] | None,
    compat: Collection[str],
) -> None:
    """Every option given must be one this sampler acts on."""
    unknown = sorted(set(compat) - set(CORRECTIONS))
    if unknown:
        raise RequestError(f"unknown correction {unknown[0]!r}; {closest(unknown[0], CORRECTIONS)}")
    if sigmas is not None and schedule is not None:
        raise RequestError(f"got both sigmas and schedule={schedule!r}; give one of them")
    given: dict[str, str] = {}
    if eta is not None:
        given["eta"] = "eta"
    if churn != (0.0, 0.0, math.inf, 1.0):
        given["s_churn"] = "churn (s_churn, s_tmin, s_tmax, s_noise)"
    if sigmas is not None:
        given["sigmas"] = "sigmas"
    if schedule is not None:
        key = "sigmas" if resolve_schedule(schedule) in SIGMA_SCHEDULES else "schedule"
        given[key] = f"schedule={schedule!r}"
    given |= {correction: f"compat={correction!r}" for correction in compat}
    for option, label in given.items():
        if name not in HONOURS[option]:
            raise RequestError(
                f"sampler {name!r} ({CLASS_NAMES[name]}) does not use {label}; "
                f"samplers that do: {', '.join(HONOURS[option])}"
            )
