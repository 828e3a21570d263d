"""Samplers: whole trajectories against diffusers, in float64 and as it ships."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from reference.sampling import draw, network, run, worst
from reference.schedulers import make, trajectory

from stepfuse.engine.sampling.names import CLASS_NAMES, SAMPLERS
from stepfuse.engine.sampling.planning import make_plan
from stepfuse.engine.sampling.scheduler_config import SchedulerConfig
from stepfuse.engine.sampling.update import Plan

SD15 = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "skip_prk_steps": True,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
SDXL = {
    **SD15,
    "_class_name": "EulerDiscreteScheduler",
    "interpolation_type": "linear",
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "timestep_spacing": "leading",
    "use_karras_sigmas": False,
}
SD2V = {**SD15, "_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
TURBO = {**SDXL, "timestep_spacing": "trailing"}
ZERO_SNR = {
    **SD2V,
    "timestep_spacing": "trailing",
    "rescale_betas_zero_snr": True,
    "set_alpha_to_one": True,
}
KARRAS = {
    **SDXL,
    "_class_name": "DPMSolverMultistepScheduler",
    "use_karras_sigmas": True,
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
    "final_sigmas_type": "sigma_min",
}
UNIPC = {**SD15, "_class_name": "UniPCMultistepScheduler", "solver_type": "bh2", "solver_order": 3, "predict_x0": True}
LCM = {**SD15, "_class_name": "LCMScheduler", "original_inference_steps": 50, "timestep_scaling": 10.0}
PIXEL = {"_class_name": "DDPMScheduler", "clip_sample": True, "variance_type": "fixed_large", "beta_schedule": "linear"}
COSINE = {"_class_name": "DDIMScheduler", "beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"}
BARE = {"_class_name": "EulerDiscreteScheduler"}
CONFIGS = {
    "sd15": SD15,
    "sdxl": SDXL,
    "sd2v": SD2V,
    "turbo": TURBO,
    "zero_snr": ZERO_SNR,
    "karras": KARRAS,
    "unipc": UNIPC,
    "lcm": LCM,
    "pixel": PIXEL,
    "cosine": COSINE,
    "bare": BARE,
}

# diffusers converts its tables with np.array(tensor).
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def compare(
    config: dict[str, Any],
    sampler: str,
    steps: int,
    *,
    dtype: torch.dtype = torch.float64,
    changed: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[Plan, float, float]:
    """Our plan of `sampler` on `config`, and the largest difference of timesteps and of states from diffusers.

    `changed`: options diffusers' target is told, `options`: what `make_plan` is told instead.
    """
    source = make(getattr(diffusers, config["_class_name"]), config, dtype)
    theirs = make(getattr(diffusers, CLASS_NAMES[sampler]), source.config, dtype, **(changed or {}))
    step_options = {"eta": options["eta"]} if "eta" in options else {}
    unit, noises = draw(1, 7, dtype)[0], draw(steps * 2 + 12, 8, dtype)
    if sampler == "ddpm" and config.get("variance_type") != "fixed_large":
        noises[steps - 1].zero_()  # diffusers draws the last noise with a deviation of 1e-10, clamped from 0
    timesteps, states = trajectory(theirs, steps, unit, network, noises, **step_options)
    plan = make_plan(SchedulerConfig.from_diffusers(config), steps=steps, sampler=sampler, **options)
    ours = run(plan, unit * plan.init_scale, network, noises)
    assert len(plan.timesteps) == len(timesteps)
    gap = max(abs(a - b) for a, b in zip(plan.timesteps, timesteps, strict=True))
    return plan, gap, worst(ours, states)


def refused(config: dict[str, Any], sampler: str, steps: int, prediction: str) -> bool:
    """Combinations diffusers has no answer for."""
    skips = config.get("skip_prk_steps", False)
    return (sampler == "pndm" and (prediction == "sample" or (not skips and steps < 4))) or (
        sampler == "euler_a" and prediction == "sample"
    )


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_trajectories_equal_diffusers_in_float64(sampler: str, prediction: str, spacing: str) -> None:
    for steps in (1, 2, 5, 13, 20):
        config = {**SD15, "prediction_type": prediction, "timestep_spacing": spacing}
        if refused(config, sampler, steps, prediction):
            continue
        _, gap, error = compare(config, sampler, steps)
        assert gap <= 1e-9, steps
        assert error <= 1e-12, steps


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", CONFIGS)
def test_other_samplers_keep_the_checkpoint_settings(name: str, sampler: str) -> None:
    config = CONFIGS[name]
    prediction = config.get("prediction_type", "epsilon")
    for steps in (4, 10):
        if refused(config, sampler, steps, prediction):
            continue
        _, gap, error = compare(config, sampler, steps)
        assert gap <= 1e-9
        # The cosine table starts at sigma 20291: float64 rounds x there by 4e-12, and Heun multiplies slopes by sigma.
        assert error <= (1e-8 if name == "cosine" else 1e-12)


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd2v", "turbo", "zero_snr", "karras", "lcm"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_trajectories_equal_stock_diffusers_in_float32(sampler: str, name: str) -> None:
    _, gap, error = compare(CONFIGS[name], sampler, 20, dtype=torch.float32)
    assert gap <= 0.02  # stock tables are a float32 cumulative product: sigma, and t interpolated from it, move
    assert error <= 5e-5


@pytest.mark.parametrize("schedule", ["karras", "exponential", "beta"])
@pytest.mark.parametrize("sampler", ["euler", "heun", "lms", "dpmpp_2m"])
@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd2v", "cosine"])
def test_sigma_schedules_equal_diffusers(name: str, sampler: str, schedule: str) -> None:
    config = CONFIGS[name]
    for steps in (2, 7, 20):
        changed = {f"use_{schedule}_sigmas": True}
        if name == "cosine" and sampler == "dpmpp_2m":
            continue  # diffusers looks steps up by timestep; duplicates make it index past the end
        plan, gap, error = compare(config, sampler, steps, changed=changed, schedule=schedule)
        assert plan.schedule == schedule
        assert gap <= 1e-9
        assert error <= (2e-6 if name == "cosine" else 2e-12)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "euler", "euler_a", "heun", "lms", "dpmpp_2m", "pndm"])
def test_spacing_override_equals_diffusers(sampler: str, spacing: str) -> None:
    plan, gap, error = compare(SDXL, sampler, 11, changed={"timestep_spacing": spacing}, schedule=spacing)
    assert plan.schedule == spacing
    assert gap <= 1e-9
    assert error <= 1e-12


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", ["sd15", "zero_snr", "pixel"])
def test_ddim_eta_equals_diffusers(name: str, eta: float) -> None:
    _, _, error = compare(CONFIGS[name], "ddim", 10, eta=eta)
    assert error <= 1e-12


@pytest.mark.parametrize(
    "changed",
    [
        {"solver_order": 1},
        {"solver_order": 3},
        {"solver_order": 3, "final_sigmas_type": "sigma_min"},
        {"solver_order": 3, "lower_order_final": False, "final_sigmas_type": "sigma_min"},
        {"solver_type": "heun"},
        {"solver_type": "logrho", "algorithm_type": "deis", "final_sigmas_type": "sigma_min"},
        {"euler_at_final": True, "final_sigmas_type": "sigma_min"},
        {"algorithm_type": "sde-dpmsolver++"},
        {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"},
        {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True, "final_sigmas_type": "sigma_min"},
        {"use_lu_lambdas": True},
        {"lambda_min_clipped": -2.0},
        {"lambda_min_clipped": -2.0, "timestep_spacing": "leading"},
    ],
)
@pytest.mark.parametrize("steps", [9, 14, 15, 20])  # the order is lowered at the end below 15 steps
def test_dpmpp_options_equal_diffusers(changed: dict[str, Any], steps: int) -> None:
    config = {**KARRAS, "use_karras_sigmas": False, "final_sigmas_type": "zero", **changed}
    _, gap, error = compare(config, "dpmpp_2m", steps)
    assert gap <= 1e-9
    assert error <= 1e-12


@pytest.mark.parametrize(
    "changed",
    [
        {"final_sigmas_type": "sigma_min"},
        {"interpolation_type": "log_linear"},
        {"interpolation_type": "log_linear", "use_karras_sigmas": True},
        {"use_karras_sigmas": True, "sigma_min": 0.1, "sigma_max": 9.0},
        {"timestep_type": "continuous", "prediction_type": "v_prediction", "use_karras_sigmas": True},
        {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        {"trained_betas": np.linspace(0.001, 0.03, 400).tolist(), "num_train_timesteps": 400},
    ],
)
@pytest.mark.parametrize("sampler", ["euler", "heun", "lms"])
def test_euler_options_equal_diffusers(changed: dict[str, Any], sampler: str) -> None:
    _, gap, error = compare({**SDXL, **changed}, sampler, 12)
    assert gap <= 1e-9
    assert error <= 1e-12


@pytest.mark.parametrize("steps", [4, 5, 12])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_pndm_runge_kutta_steps_equal_diffusers(spacing: str, prediction: str, steps: int) -> None:
    config = {**SD15, "skip_prk_steps": False, "prediction_type": prediction, "timestep_spacing": spacing}
    plan, gap, error = compare(config, "pndm", steps)
    assert len(plan.updates) == steps + 9
    assert gap == 0
    assert error <= 1e-12


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log", "fixed_large"])
def test_ddpm_variances_equal_diffusers(variance: str) -> None:
    _, _, error = compare({**PIXEL, "variance_type": variance, "clip_sample_range": 0.7}, "ddpm", 25)
    assert error <= 1e-12


@pytest.mark.parametrize("schedule", ["karras", "exponential"])
@pytest.mark.parametrize("config", [SD15, SD2V])
def test_ddim_on_a_sigma_schedule_is_euler(config: dict[str, Any], schedule: str) -> None:
    """The two are one method in different coordinates: x / sqrt(1 + sigma^2) and x."""
    parsed = SchedulerConfig.from_diffusers(config)
    unit = draw(1)[0]
    ends = []
    for sampler in ("ddim", "euler"):
        plan = make_plan(parsed, steps=9, sampler=sampler, schedule=schedule)
        ends.append(run(plan, plan.updates[0].sigma * unit, network)[-1])
    assert worst(ends[:1], ends[1:]) <= 1e-12
