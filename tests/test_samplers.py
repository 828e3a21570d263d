"""Samplers: whole trajectories against diffusers, in float64 and as it ships."""

from __future__ import annotations

import math
from collections.abc import Callable
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
    call: Callable[[torch.Tensor, float], torch.Tensor] = network,
    mask: torch.Tensor | None = None,
    **options: Any,
) -> tuple[Plan, float, float]:
    """Our plan of `sampler` on `config`, and the largest difference of timesteps and of states from diffusers.

    `changed`: options diffusers' target is told, `options`: what `make_plan` is told instead; `mask`: of inpainting.
    """
    source = make(getattr(diffusers, config["_class_name"]), config, dtype)
    theirs = make(getattr(diffusers, CLASS_NAMES[sampler]), source.config, dtype, **(changed or {}))
    step_options = {"eta": options["eta"]} if "eta" in options else {}
    unit, noises = draw(1, 7, dtype)[0], draw(steps * 2 + 12, 8, dtype)
    if sampler == "ddpm" and config.get("variance_type", "fixed_small").startswith("fixed_small"):
        noises[steps - 1].zero_()  # diffusers draws the last noise with a deviation of 1e-10, clamped from 0
    plan = make_plan(SchedulerConfig.from_diffusers(config), steps=steps, sampler=sampler, **options)
    known = torch.stack((draw(1, 9, dtype)[0], unit), 1)
    if mask is not None:
        plan = plan.inpainting()
        step_options["after"] = lambda i, x: put_back(theirs, i, x, known, mask)
    timesteps, states = trajectory(theirs, steps, unit, call, noises, **step_options)
    extra = {} if mask is None else {"mask": mask, "known": known}
    ours = run(plan, unit * plan.init_scale, call, noises, **extra)
    assert len(plan.timesteps) == len(timesteps)
    gap = max(abs(a - b) for a, b in zip(plan.timesteps, timesteps, strict=True))
    return plan, gap, worst(ours, states)


def put_back(scheduler: Any, i: int, x: torch.Tensor, known: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What `StableDiffusionInpaintPipeline` does after step i with a network of four input channels."""
    image, noise = known.unbind(1)
    if i < len(scheduler.timesteps) - 1:
        image = scheduler.add_noise(image, noise, torch.tensor([scheduler.timesteps[i + 1]]))
    return (1 - mask) * image + mask * x


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


def with_variance(x: torch.Tensor, timestep: float) -> torch.Tensor:
    """A network of twice the channels: the prediction, and what stands for a variance, -1 to 1 and a little beyond."""
    return torch.cat((network(x, timestep), 1.1 * torch.sin(3.0 * x + timestep)), 1)


def with_positive_variance(x: torch.Tensor, timestep: float) -> torch.Tensor:
    return torch.cat((network(x, timestep), 0.02 + torch.sin(3.0 * x + timestep) ** 2), 1)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("variance", "call"), [("learned_range", with_variance), ("learned", with_positive_variance)])
def test_learned_variances_equal_diffusers(
    variance: str, call: Callable[[torch.Tensor, float], torch.Tensor], prediction: str, spacing: str
) -> None:
    config = {**PIXEL, "variance_type": variance, "prediction_type": prediction, "timestep_spacing": spacing}
    for steps in (1, 4, 25):
        plan, gap, error = compare(config, "ddpm", steps, call=call)
        assert gap == 0
        assert error <= 1e-10, steps
        assert plan.learned_variance == (steps > 1 or spacing == "trailing")  # the step from timestep 0 draws nothing


def far(x: torch.Tensor, timestep: float) -> torch.Tensor:
    """A prediction whose estimates leave -1..1 at every level."""
    return 3.0 * network(x, timestep)


def far_with_variance(x: torch.Tensor, timestep: float) -> torch.Tensor:
    return torch.cat((far(x, timestep), with_variance(x, timestep)[:, x.shape[1] :]), 1)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(
    ("sampler", "changed"),
    [
        ("ddim", {}),
        ("ddim", {"eta": 0.6}),
        ("ddpm", {}),
        ("ddpm", {"variance_type": "learned_range"}),
        ("dpmpp_2m", {}),
        ("dpmpp_2m", {"solver_order": 3}),
        ("dpmpp_2m", {"algorithm_type": "sde-dpmsolver++"}),
        ("lcm", {}),
    ],
)
@pytest.mark.parametrize(("ratio", "most"), [(0.95, 1.5), (0.8, 100.0), (0.995, 1.0)])
def test_dynamic_thresholding_equals_diffusers(
    sampler: str, changed: dict[str, Any], ratio: float, most: float, prediction: str
) -> None:
    options, call = dict(changed), far_with_variance if "variance_type" in changed else far
    eta = {"eta": options.pop("eta")} if "eta" in options else {}
    config = {**PIXEL, "variance_type": "fixed_small", "_class_name": CLASS_NAMES[sampler], **options}
    config |= {"thresholding": True, "dynamic_thresholding_ratio": ratio, "sample_max_value": most}
    config |= {"prediction_type": prediction, "clip_sample": sampler != "dpmpp_2m"}
    for steps in (2, 11):
        plan, gap, error = compare(config, sampler, steps, call=call, **eta)
        assert gap <= 1e-9
        assert error <= 1e-12, steps
        assert all(math.isinf(u.clamp) for u in plan.updates)
    off = make_plan(SchedulerConfig.from_diffusers(config), steps=11, sampler=sampler, dynamic_threshold=0, **eta)
    unit, noises = draw(1, 7)[0], draw(34, 8)
    ends = [run(p, unit * p.init_scale, call, noises)[-1] for p in (plan, off)]
    assert off.dynamic_threshold is None
    same = config["clip_sample"] and most == 1.0  # clipping to -1..1
    assert (worst(ends[:1], ends[1:]) <= 1e-12) == same


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m", "euler"])
def test_other_samplers_leave_a_learned_variance_alone(sampler: str) -> None:
    config = {**PIXEL, "variance_type": "learned_range", "clip_sample": False}
    plan, noises = make_plan(SchedulerConfig.from_diffusers(config), steps=5, sampler=sampler), draw(12, 8)
    assert not plan.learned_variance
    both = [run(plan, draw(1, 7)[0] * plan.init_scale, call, noises) for call in (with_variance, network)]
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))


MASK = torch.tensor([[0.0, 1.0, 0.3, 1.0, 0.0], [1.0, 1.0, 0.0, 0.75, 0.5], [0.0, 0.0, 1.0, 1.0, 0.1]]).double()[
    None, None
]


@pytest.mark.parametrize("name", ["sd15", "sd2v", "karras"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_inpainting_equals_diffusers(sampler: str, name: str) -> None:
    for steps in (1, 4, 11):
        _, gap, error = compare(CONFIGS[name], sampler, steps, mask=MASK)
        assert gap <= 1e-9
        assert error <= 1e-12, steps


@pytest.mark.parametrize("sampler", ["ddim", "euler", "heun"])
def test_a_strength_for_every_pixel_is_image_to_image_of_that_strength(sampler: str) -> None:
    config, steps = SchedulerConfig.from_diffusers(SDXL), 10
    known = torch.stack(draw(2, 5), 1)
    whole = make_plan(config, steps=steps, sampler=sampler).inpainting(strengths=True)
    start = whole.init_scale * known[:, 1]
    for strength, skipped in ((1.0, 0), (0.95, 1), (0.9, 1), (0.5, 5), (0.12, 9), (0.1, 9)):
        plan = make_plan(config, steps=steps, sampler=sampler, start=skipped)
        alone = run(plan, plan.init_alpha * known[:, 0] + plan.init_scale * known[:, 1], network)
        found = run(whole, start, network, mask=torch.full_like(MASK, strength), known=known)
        assert worst(found[-len(alone) :], alone) <= 1e-12, strength
    for strength in (0.0, 0.09):
        assert torch.equal(run(whole, start, network, mask=0 * MASK + strength, known=known)[-1], known[:, 0])


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
