"""Noise schedules, sigma schedules, names and scheduler configurations: oracles, diffusers' tables, errors."""

from __future__ import annotations

import inspect
import json
import math
import subprocess
import sys
from fractions import Fraction
from typing import Any

import diffusers
import numpy as np
import pytest
import scipy.stats
import torch

from stepfuse.engine.errors import CheckpointError, RequestError
from stepfuse.engine.sampling.beta_quantile import beta_quantile
from stepfuse.engine.sampling.names import (
    CLASS_NAMES,
    CLASS_SAMPLERS,
    SAMPLERS,
    SCHEDULES,
    resolve_sampler,
    resolve_schedule,
)
from stepfuse.engine.sampling.planning import make_plan
from stepfuse.engine.sampling.predictions import PREDICTIONS, denoised_coefficients, resolve_prediction
from stepfuse.engine.sampling.sampler_options import DEFAULTS
from stepfuse.engine.sampling.scheduler_config import SchedulerConfig
from stepfuse.engine.sampling.schedules import (
    NoiseSchedule,
    beta_sigmas,
    beta_table,
    exponential_sigmas,
    karras_sigmas,
    rescale_zero_terminal_snr,
    spaced_timesteps,
)
from stepfuse.engine.sampling.update import stack_tables
from stepfuse.kernels.sampler_step.columns import Column

SD = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
}


def config(**changed: Any) -> SchedulerConfig:
    return SchedulerConfig.from_diffusers({**SD, **changed})


@pytest.mark.parametrize(
    ("kind", "cls"),
    [
        ("linear", "DDIMScheduler"),
        ("scaled_linear", "DDIMScheduler"),
        ("squaredcos_cap_v2", "DDIMScheduler"),
        ("sigmoid", "DDPMScheduler"),
        ("laplace", "DDPMScheduler"),
        ("exp", "HeunDiscreteScheduler"),
    ],
)
def test_beta_tables_equal_diffusers(kind: str, cls: str) -> None:
    theirs = getattr(diffusers, cls)(beta_schedule=kind, beta_start=0.001, beta_end=0.02).betas.double().numpy()
    assert np.abs(beta_table(kind, 0.001, 0.02, 1000) / theirs - 1.0).max() < 1e-5


def test_alpha_bar_equals_exact_products() -> None:
    """Against products in rational arithmetic of the same betas, at a few timesteps."""
    schedule = NoiseSchedule.from_options(config().resolve("ddim"))
    product = Fraction(1)
    for t, beta in enumerate(beta_table("scaled_linear", 0.00085, 0.012, 1000)[:300]):
        product *= 1 - Fraction(float(beta))
        product = Fraction(round(product * 2**120), 2**120)
        assert schedule.alphas_cumprod[t] == pytest.approx(float(product), rel=1e-12)


def test_zero_terminal_snr() -> None:
    bar = np.cumprod(1.0 - beta_table("scaled_linear", 0.00085, 0.012, 1000))
    rescaled = rescale_zero_terminal_snr(bar)
    assert rescaled[-1] == 0.0
    assert rescaled[0] == pytest.approx(bar[0], rel=1e-14)
    assert (np.diff(rescaled) < 0).all()
    theirs = diffusers.DDIMScheduler(beta_schedule="scaled_linear", rescale_betas_zero_snr=True, beta_start=0.00085,
                                     beta_end=0.012).alphas_cumprod.double().numpy()  # fmt: skip
    assert np.abs(rescaled - theirs).max() < 1e-6


def test_zero_snr_start_has_no_signal_and_is_refused_for_epsilon() -> None:
    plan = make_plan(config(rescale_betas_zero_snr=True, prediction_type="v_prediction"), steps=8, schedule="trailing")
    first = plan.updates[0]
    assert (first.alpha, first.sigma, first.p, first.q) == (0.0, 1.0, 0.0, -1.0)
    with pytest.raises(RequestError, match="zero terminal"):
        make_plan(config(rescale_betas_zero_snr=True), steps=8, schedule="trailing")
    assert make_plan(config(rescale_betas_zero_snr=True), steps=8, schedule="leading").updates[0].alpha > 0.0


def test_sigma_schedules() -> None:
    karras = karras_sigmas(9, 0.03, 14.0)
    assert karras ** (1 / 7) == pytest.approx(np.linspace(14.0 ** (1 / 7), 0.03 ** (1 / 7), 9), rel=1e-13)
    exponential = exponential_sigmas(9, 0.03, 14.0)
    assert np.diff(np.log(exponential)) == pytest.approx([math.log(0.03 / 14.0) / 8] * 8, rel=1e-12)
    quantiles = scipy.stats.beta.ppf(1.0 - np.linspace(0.0, 1.0, 9), 0.6, 0.6)
    assert beta_sigmas(9, 0.03, 14.0) == pytest.approx(0.03 + quantiles * (14.0 - 0.03), rel=1e-12)
    for values in (karras, exponential, beta_sigmas(9, 0.03, 14.0)):
        assert values[0] == pytest.approx(14.0, rel=1e-12)
        assert values[-1] == pytest.approx(0.03, rel=1e-12)


@pytest.mark.parametrize(("a", "b"), [(0.6, 0.6), (0.5, 2.0), (3.0, 0.7)])
def test_beta_quantile_equals_scipy(a: float, b: float) -> None:
    for u in (0.0, 1e-6, 0.01, 0.3, 0.5, 0.9, 0.9999, 1.0):
        assert beta_quantile(u, a, b) == pytest.approx(float(scipy.stats.beta.ppf(u, a, b)), rel=1e-11, abs=1e-15)


def test_timestep_of_inverts_the_table() -> None:
    schedule = NoiseSchedule.from_options(config().resolve("euler"))
    for t in (0, 1, 500, 998, 999):
        assert schedule.timestep_of(float(schedule.sigmas[t])) == pytest.approx(t, abs=1e-9)
    middle = math.sqrt(schedule.sigmas[10] * schedule.sigmas[11])
    assert schedule.timestep_of(middle) == pytest.approx(10.5, abs=1e-9)
    assert (schedule.timestep_of(1e-9), schedule.timestep_of(1e9)) == (0.0, 999.0)


def test_trailing_never_has_a_step_too_many() -> None:
    for steps in range(1, 1001):
        t = spaced_timesteps("trailing", steps, 1000)
        assert len(t) == steps
        assert t[0] == 999
        assert t[-1] >= 0
        assert (np.diff(t) < 0).all()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_defaults_are_those_of_the_diffusers_class(sampler: str) -> None:
    parameters = inspect.signature(getattr(diffusers, CLASS_NAMES[sampler]).__init__).parameters
    theirs = {name: p.default for name, p in parameters.items() if name != "self"}
    assert DEFAULTS[sampler] == theirs


@pytest.mark.parametrize("cls", sorted(set(CLASS_SAMPLERS) | {"UniPCMultistepScheduler", "DEISMultistepScheduler"}))
def test_saved_configurations_are_accepted(cls: str) -> None:
    """What diffusers writes for a scheduler built with its defaults, as a live object and as a file."""
    scheduler = getattr(diffusers, cls)()
    live = SchedulerConfig.from_diffusers({**scheduler.config, "_class_name": cls})
    assert live.options == {}
    saved = SchedulerConfig.from_diffusers(json.loads(scheduler.to_json_string()))
    assert set(saved.options) == {name for name in scheduler.config if not name.startswith("_")}
    assert saved.sampler == CLASS_SAMPLERS.get(cls)
    assert make_plan(saved, steps=5, sampler="euler").steps == 5


def test_names() -> None:
    assert resolve_sampler("DPM++ 2M") == "dpmpp_2m"
    assert resolve_sampler("DPMSolverMultistepScheduler") == "dpmpp_2m"
    assert resolve_sampler("Euler a") == "euler_a"
    assert resolve_sampler("plms") == "pndm"
    assert [resolve_sampler(s) for s in SAMPLERS] == list(SAMPLERS)
    assert [resolve_schedule(s.upper()) for s in SCHEDULES] == list(SCHEDULES)
    with pytest.raises(RequestError, match=r"did you mean 'euler'\? valid: ddim"):
        resolve_sampler("eulr")
    with pytest.raises(RequestError, match="karras"):
        resolve_schedule("karas")


def test_unavailable_checkpoint_sampler_asks_for_one() -> None:
    unipc = config(_class_name="UniPCMultistepScheduler")
    with pytest.raises(RequestError, match=r"UniPCMultistepScheduler is not available.*sampler="):
        make_plan(unipc, steps=5)
    assert make_plan(unipc, steps=5, sampler="dpm++ 2m").sampler == "dpmpp_2m"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"_class_name": None}, "_class_name"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "not supported"),
        ({"beta_shedule": "linear"}, "did you mean 'beta_schedule'"),
        ({"beta_schedule": "cubic"}, "valid: exp"),
        ({"beta_start": 2.0}, "between 0 and 1"),
        ({"num_train_timesteps": "1000"}, "expected int"),
        ({"clip_sample": 1}, "expected bool"),
        ({"trained_betas": []}, "expected tuple"),
        ({"prediction_type": "velocity"}, "prediction_type"),
        ({"predict_epsilon": False}, "sample"),
        ({"variance_type": "learnt"}, "variance_type"),
    ],
)
def test_bad_configurations(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        config(**changed)


@pytest.mark.parametrize(
    ("changed", "sampler", "message"),
    [
        ({"thresholding": True, "dynamic_thresholding_ratio": 0.0}, "ddim", "above 0, up to 1"),
        ({"thresholding": True, "sample_max_value": 0.5}, "ddpm", "at least 1"),
        ({"prediction_type": "flow_prediction"}, "euler", "beta schedule"),
        ({"use_flow_sigmas": True}, "dpmpp_2m", "flow"),
        ({"algorithm_type": "dpmsolver"}, "dpmpp_2m", "dpmsolver"),
        ({"use_karras_sigmas": True, "use_beta_sigmas": True}, "euler", "only one"),
    ],
)
def test_unsupported_configurations_name_the_sampler(changed: dict[str, Any], sampler: str, message: str) -> None:
    parsed = config(**changed)
    with pytest.raises(CheckpointError, match=message) as caught:
        make_plan(parsed, steps=5, sampler=sampler)
    assert CLASS_NAMES[sampler] in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "at least 1"),
        ({"steps": 2.5}, "integer"),
        ({"steps": 1001}, "trained on 1000"),
        ({"start": 10}, "leaves none"),
        ({"eta": math.nan, "sampler": "ddim"}, "from 0 to 1"),
        ({"eta": 0.5, "sampler": "euler"}, r"does not use eta; samplers that do: ddim, euler_a"),
        ({"s_churn": 3.0, "sampler": "ddim"}, r"does not use churn .*: euler, heun"),
        ({"s_noise": 1.1, "sampler": "lms"}, "euler, heun"),
        ({"s_churn": -1.0, "sampler": "euler"}, "at least 0"),
        ({"schedule": "karras", "sampler": "pndm"}, "does not use schedule"),
        ({"schedule": "leading", "sampler": "lcm"}, "does not use schedule"),
        ({"sigmas": [3.0, 1.0, 0.0], "sampler": "lcm", "steps": 2}, "does not use sigmas"),
        ({"sigmas": [3.0, 1.0, 0.0]}, "expected 11"),
        ({"sigmas": [1.0, 3.0, 0.0], "steps": 2}, "descending"),
        ({"sigmas": [math.inf, 3.0, 0.0], "steps": 2}, "finite"),
        ({"sigmas": [3.0, 0.0], "steps": 1, "schedule": "karras"}, "both"),
        ({"compat": ["next_step"]}, "next_timestep"),
        ({"compat": ["next_timestep"], "sampler": "euler"}, "ddim"),
        ({"sampler": "lcm", "steps": 51}, "at most 50"),
        ({"sampler": "pndm", "steps": 3}, "at least 4"),
    ],
)
def test_bad_requests(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        make_plan(config(), **{"steps": 10, **options})


def test_user_sigmas_equal_diffusers() -> None:
    sigmas = [14.615, 6.475, 3.861, 1.886, 0.963, 0.399, 0.0]
    theirs = diffusers.EulerDiscreteScheduler.from_config(SD)
    theirs.set_timesteps(sigmas=sigmas)
    plan = make_plan(config(), steps=6, sampler="euler", sigmas=sigmas)
    assert plan.timesteps == pytest.approx(theirs.timesteps.tolist(), abs=0.02)
    assert [u.sigma for u in plan.updates] == sigmas[:-1]
    assert plan.init_scale == sigmas[0]
    assert plan.schedule == "sigmas"


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_start_skips_steps(sampler: str) -> None:
    options = {"skip_prk_steps": True}
    whole = make_plan(config(**options), steps=10, sampler=sampler)
    part = make_plan(config(**options), steps=10, sampler=sampler, start=4)
    first = part.updates[0]
    reached = next(u for u in whole.updates if u.step == 4)
    assert (first.step, first.timestep, first.alpha, first.sigma) == (4, reached.timestep, reached.alpha, reached.sigma)
    assert (part.init_alpha, part.init_scale) == (first.alpha, first.sigma)
    assert (whole.init_alpha, whole.steps, part.steps) == (0.0, 10, 10)
    assert first.C1 == first.C2 == first.C3 == 0.0
    assert part.updates[-1] == whole.updates[-1]


def test_next_timestep_correction() -> None:
    published = make_plan(config(), steps=13, sampler="ddim", schedule="trailing")
    corrected = make_plan(config(), steps=13, sampler="ddim", schedule="trailing", compat=["next_timestep"])
    assert published.timesteps == corrected.timesteps
    for now, then in zip(corrected.updates[:-1], corrected.updates[1:], strict=True):
        assert math.hypot(now.A * now.sigma, 0.0) == pytest.approx(then.sigma, rel=1e-12)
    assert published.updates[3].A * published.updates[3].sigma != pytest.approx(corrected.updates[4].sigma, rel=1e-4)
    leading = [make_plan(config(), steps=13, sampler="ddim", compat=c) for c in ((), ("next_timestep",))]
    assert leading[0].updates[:-1] == leading[1].updates[:-1]


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_denoised_coefficients_recover_the_image(prediction: str) -> None:
    x0, eps = 0.8, -1.3
    angle = 0.6
    alpha, sigma = {
        "flow": (0.3, 0.7),
        "edm": (1.0, 2.5),
        "trigflow": (math.cos(angle), math.sin(angle)),
    }.get(prediction, (0.6, 0.8))
    x = alpha * x0 + sigma * eps
    said = {
        "epsilon": eps,
        "v_prediction": alpha * eps - sigma * x0,
        "sample": x0,
        "flow": eps - x0,
        "score": -eps / sigma,
        "trigflow": alpha * eps - sigma * x0,
        "edm": (x0 - x / (1 + sigma**2)) / (sigma / math.hypot(1.0, sigma)),
    }[prediction]
    p, q = denoised_coefficients(prediction, alpha, sigma)
    assert p * x + q * said == pytest.approx(x0, rel=1e-12)


def test_v_prediction_is_the_same_in_both_state_spaces() -> None:
    sigma = 1.7
    p, q = denoised_coefficients("v_prediction", 1.0, sigma)
    assert p == pytest.approx(1 / (sigma**2 + 1))
    assert q == pytest.approx(-sigma / math.sqrt(sigma**2 + 1))


def test_prediction_names() -> None:
    assert resolve_prediction("flow_prediction") == "flow"
    with pytest.raises(RequestError, match="epsilon"):
        resolve_prediction("epsilom")


def test_table_layout() -> None:
    plan = make_plan(config(), steps=6, sampler="heun")
    table = plan.table()
    assert table.shape == (11, len(Column))
    assert table.dtype == np.float64
    for line, u in zip(table, plan.updates, strict=True):
        assert line[Column.LIVE] == 1.0
        assert line[Column.A] == u.A
        assert line[Column.ED] == u.eD
        assert line[Column.KEEP_BASE] == float(u.keep_base)
        assert line[Column.STEP] == u.step
        assert line[Column.CLAMP] == math.inf
    stacked = stack_tables([plan, make_plan(config(), steps=2)])
    assert stacked.shape == (2, 11, len(Column))
    assert (stacked[1, 2:] == 0.0).all()
    assert (stacked[0] == table).all()
    assert torch.from_numpy(stacked).float().isfinite().all(dim=-1).sum() == 9  # padding only: CLAMP is inf


def test_planning_imports_no_torch() -> None:
    code = "import sys, stepfuse.engine.sampling.planning as p; assert p.make_plan and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
