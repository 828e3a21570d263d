"""Parts of a schedule: image to image by strength, schedules cut for two models; against diffusers and solutions."""

from __future__ import annotations

import itertools
import math
from typing import Any

import diffusers
import pytest
import torch
from reference.linear import final_form
from reference.sampling import draw, network, run, worst
from reference.schedulers import make, precision
from torch import Tensor

from stepfuse.engine.errors import RequestError
from stepfuse.engine.sampling.names import CLASS_NAMES, SAMPLERS
from stepfuse.engine.sampling.planning import make_plan
from stepfuse.engine.sampling.scheduler_config import SchedulerConfig
from stepfuse.engine.sampling.update import Plan, Update

SD15 = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "clip_sample": False,
    "skip_prk_steps": True,
}
EXACT = {**SD15, "set_alpha_to_one": True, "steps_offset": 0}
CONFIGS = {
    "sd15": SD15,
    "trailing_v": {**SD15, "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
    "karras": {**SD15, "_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True},
    "clipped": {**SD15, "clip_sample": True},
}
HISTORY = ("lms", "dpmpp_2m", "pndm")
"""Samplers whose updates use earlier evaluations of other steps."""

# diffusers converts its tables with np.array(tensor).
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def plan_of(config: dict[str, Any], sampler: str, steps: int, **options: Any) -> Plan:
    return make_plan(SchedulerConfig.from_diffusers(config), steps=steps, sampler=sampler, **options)


def started(plan: Plan, image: Tensor, noise: Tensor) -> Tensor:
    return plan.init_alpha * image + plan.init_scale * noise


def scheduler(config: dict[str, Any], sampler: str, steps: int) -> Any:
    source = make(getattr(diffusers, config["_class_name"]), config, torch.float64)
    made = make(getattr(diffusers, CLASS_NAMES[sampler]), source.config, torch.float64)
    with precision(type(made), torch.float64):
        made.set_timesteps(steps)
    return made


def loop(theirs: Any, timesteps: Tensor, x: Tensor, noises: list[Tensor]) -> list[Tensor]:
    """The states of a pipeline's denoising loop."""
    states = []
    with precision(type(theirs), torch.float64, noises):
        for t in timesteps:
            out = network(theirs.scale_model_input(x, t), float(t))
            x = theirs.step(out, t, x, return_dict=False)[0]
            states.append(x)
    return states


def image_to_image(theirs: Any, start: int, image: Tensor, noise: Tensor, noises: list[Tensor]) -> list[Tensor]:
    """`StableDiffusionImg2ImgPipeline`, its denoising loop from step `start` on."""
    timesteps = theirs.timesteps[start * theirs.order :]
    if hasattr(theirs, "set_begin_index"):
        theirs.set_begin_index(start * theirs.order)
    return loop(theirs, timesteps, theirs.add_noise(image, noise, timesteps[:1]), noises)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("sampler", [s for s in SAMPLERS if s not in ("lms", "pndm")])
def test_strength_equals_diffusers_image_to_image(sampler: str, name: str) -> None:
    image, noise, *noises = draw(60, 3)
    for steps, strength in ((10, 1.0), (10, 0.99), (10, 0.5), (20, 0.7), (7, 0.15), (50, 0.58)):
        start = steps - min(int(steps * strength), steps)  # their `get_timesteps`; 0.58 * 50 is 28.99...
        plan = plan_of(CONFIGS[name], sampler, steps, strength=strength)
        assert plan.updates[0].step == start
        drawn = list(noises)
        if sampler == "ddpm":
            drawn[steps - start - 1] = 0 * image  # the last noise of diffusers has a deviation of 1e-10, clamped from 0
        theirs = image_to_image(scheduler(CONFIGS[name], sampler, steps), start, image, noise, drawn)
        assert worst(run(plan, started(plan, image, noise), network, drawn), theirs) <= 1e-12, (steps, strength)


def test_strength_with_lms_begins_with_an_empty_history() -> None:
    """diffusers weighs the first slopes as if it had older ones: its weights do not add up to the step."""
    image, noise = draw(2, 3)
    plan = plan_of(SD15, "lms", 10, strength=0.5)
    ours = run(plan, started(plan, image, noise), network)
    assert worst(ours, image_to_image(scheduler(SD15, "lms", 10), 5, image, noise, [])) > 0.1
    alone = scheduler(SD15, "lms", 10)
    alone.sigmas, alone.timesteps = alone.sigmas[5:], alone.timesteps[5:]
    assert worst(ours, image_to_image(alone, 0, image, noise, [])) <= 1e-12


def test_strength_with_pndm_counts_steps() -> None:
    """diffusers counts evaluations, and slices away the one that its warm-up repeats: it arrives a step too high."""
    image, noise = draw(2, 3)
    plan = plan_of(SD15, "pndm", 10, strength=0.5)
    ours = run(plan, started(plan, image, noise), network)
    theirs = scheduler(SD15, "pndm", 10)
    assert worst(ours, image_to_image(theirs, 5, image, noise, [])[: len(ours)]) > 0.1
    theirs = scheduler(SD15, "pndm", 10)
    theirs.timesteps = theirs.timesteps[[6, 7, 7, 8, 9, 10]]
    assert worst(ours, image_to_image(theirs, 0, image, noise, [])) <= 1e-12


MEAN, VARIANCE, IMAGE = 0.7, 0.3, -1.1


def gaussian(x: Tensor, u: Update) -> Tensor:
    """E[x0 | x] for data N(MEAN, VARIANCE)."""
    gain = u.alpha * VARIANCE / (u.alpha**2 * VARIANCE + u.sigma**2)
    D = gain * x
    D[:, 0] += MEAN * (1.0 - gain * u.alpha)
    return D


def edited(plan: Plan) -> tuple[float, float]:
    """Mean and variance of what image to image makes of IMAGE."""
    start = torch.tensor([[plan.init_alpha * IMAGE, plan.init_scale]], dtype=torch.float64)
    form = final_form(plan, gaussian, start)[0]
    return float(form[0]), float(form[1:].square().sum())


@pytest.mark.parametrize(
    ("sampler", "order", "tolerance"),
    [("ddim", 1, 0.02), ("euler", 1, 0.02), ("dpmpp_2m", 2, 0.0005), ("heun", 2, 0.0005), ("ddpm", 1, 0.03),
     ("euler_a", 1, 0.03)],
)  # fmt: skip
@pytest.mark.parametrize("strength", [0.5, 0.625, 0.75, 1.0])
def test_sdedit_of_a_gaussian(sampler: str, strength: float, order: float, tolerance: float) -> None:
    """The probability flow from z = image + s noise, s = sigma / alpha, keeps (z - mean) / sqrt(v + s^2); the reverse
    SDE draws from the posterior, whose variance comes on top."""
    errors = []
    for steps in (40, 80, 160):
        sigmas = torch.logspace(1.0, -4.0, steps, dtype=torch.float64).tolist()
        plan = plan_of(EXACT, sampler, steps, strength=strength, sigmas=[*sigmas, 0.0])
        s2 = (plan.updates[0].sigma / plan.updates[0].alpha) ** 2
        share = VARIANCE / (VARIANCE + s2)
        if sampler in ("ddpm", "euler_a"):
            mean, variance = MEAN + share * (IMAGE - MEAN), share**2 * s2 + share * s2
        else:
            mean, variance = MEAN + math.sqrt(share) * (IMAGE - MEAN), share * s2
        found = edited(plan)
        errors.append(math.hypot(found[0] - mean, found[1] - variance))
    assert errors[-1] <= tolerance
    assert errors[-1] < 1e-6 or math.log2(errors[-2] / errors[-1]) >= order - 0.3


def test_full_strength_starts_from_the_image_and_none_from_noise() -> None:
    for sampler in SAMPLERS:
        image, pure = plan_of(SD15, sampler, 8, strength=1.0), plan_of(SD15, sampler, 8)
        assert image.updates == pure.updates
        assert (image.init_alpha, image.init_scale) == (image.updates[0].alpha, image.updates[0].sigma)
        assert pure.init_alpha == 0.0


def halves(config: dict[str, Any], sampler: str, steps: int, cut: float, **options: Any) -> tuple[Plan, Plan, Plan]:
    """The whole plan, and those before and behind a cut."""
    whole = plan_of(config, sampler, steps, **options)
    base = plan_of(config, sampler, steps, denoising_end=cut, **options)
    return whole, base, plan_of(config, sampler, steps, denoising_start=cut, **options)


@pytest.mark.parametrize("cut", [0.1, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_cut_plans_are_the_whole_plan(sampler: str, name: str, cut: float) -> None:
    whole, base, refiner = halves(CONFIGS[name], sampler, 25, cut)
    assert (base.init_alpha, base.init_scale) == (0.0, whole.init_scale)
    assert (refiner.init_alpha, refiner.init_scale) == (1.0, 0.0)
    if sampler == "pndm":  # its warm-up takes one evaluation more, in each of the two
        assert sorted({u.step for u in base.updates + refiner.updates}) == list(range(25))
        return
    assert base.updates == whole.updates[: len(base.updates)]
    assert base.arrivals + refiner.arrivals == whole.arrivals
    assert base.timesteps + refiner.timesteps == whole.timesteps
    if sampler not in HISTORY:
        assert base.updates + refiner.updates == whole.updates
    first = refiner.updates[0]
    assert (first.C1, first.C2, first.C3) == (0.0, 0.0, 0.0)
    assert base.cut == (first.alpha, first.sigma, first.timestep)
    assert refiner.cut is None


@pytest.mark.parametrize("sampler", [s for s in SAMPLERS if s not in HISTORY])
def test_a_split_run_equals_a_single_run(sampler: str) -> None:
    whole, base, refiner = halves(SD15, sampler, 14, 0.6)
    unit, *noises = draw(40)
    single = run(whole, whole.init_scale * unit, network, noises)
    first = run(base, base.init_scale * unit, network, noises)
    second = run(refiner, started(refiner, first[-1], unit), network, noises[len(first) : len(single)])
    assert worst(first + second, single) == 0.0


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_churn_of_a_cut_plan_is_added_once(sampler: str) -> None:
    whole, base, refiner = halves(SD15, sampler, 14, 0.6, s_churn=3.0)
    at = len(base.updates) - 1
    assert whole.updates[at].S > 0.0
    assert base.updates[at].S == 0.0
    assert refiner.init_scale == whole.updates[at].S
    assert base.updates[:-1] + refiner.updates == whole.updates[:at] + whole.updates[at + 1 :]


@pytest.mark.parametrize("cut", [0.3, 0.8])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "euler", "euler_a", "dpmpp_2m", "lcm"])
def test_base_and_refiner_equal_diffusers(sampler: str, name: str, cut: float) -> None:
    """`StableDiffusionXLPipeline` to denoising_end, and `StableDiffusionXLImg2ImgPipeline` from denoising_start."""
    unit, *noises = draw(40, 4)
    noises[19].zero_()  # ddpm's last in diffusers has a deviation of 1e-10, clamped from 0
    _, base, refiner = halves(CONFIGS[name], sampler, 20, cut)
    ours = run(base, base.init_scale * unit, network, noises)
    behind = noises[len(ours) : 20]
    ours += run(refiner, refiner.init_alpha * ours[-1], network, behind)

    first, second = scheduler(CONFIGS[name], sampler, 20), scheduler(CONFIGS[name], sampler, 20)
    cutoff = round(1000 - cut * 1000)
    theirs = loop(first, first.timesteps[first.timesteps >= cutoff], unit * first.init_noise_sigma, noises)
    if hasattr(second, "set_begin_index"):
        second.set_begin_index(int((second.timesteps >= cutoff).sum()))
    theirs += loop(second, second.timesteps[second.timesteps < cutoff], theirs[-1], behind)
    assert worst(ours, theirs) <= 1e-12


def test_a_history_lost_at_the_cut_costs_one_step_of_first_order() -> None:
    for sampler in HISTORY:
        whole, base, refiner = halves(SD15, sampler, 25, 0.8)
        unit = draw(1)[0]
        single = run(whole, whole.init_scale * unit, network)[-1:]
        split = run(refiner, run(base, base.init_scale * unit, network)[-1], network)[-1:]
        assert 1e-4 < worst(split, single) < 1e-3


def test_a_mask_of_a_cut_plan_leaves_the_known_image_at_the_cut() -> None:
    _, base, refiner = halves(SD15, "euler", 10, 0.6)
    last, first = base.inpainting().updates[-1], refiner.updates[0]
    assert (last.known, last.known_noise) == (first.alpha, first.sigma)
    assert last.known_noise > 0.0
    assert (refiner.inpainting().updates[-1].known, refiner.inpainting().updates[-1].known_noise) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": 0.0}, "above 0"),
        ({"strength": 1.01}, "up to 1"),
        ({"strength": math.nan}, "strength=nan"),
        ({"strength": "0.5"}, "strength='0.5'; expected a number"),
        ({"strength": True}, "strength=True; expected a number"),
        ({"denoising_end": "0.5"}, "denoising_end='0.5'; expected a number"),
        ({"strength": 0.05}, "strength=0.05 leaves none of the 10 steps"),
        ({"start": -1}, "at least 0"),
        ({"start": 2, "strength": 0.5}, "both start and strength"),
        ({"denoising_start": 0.5, "strength": 0.5}, "both strength and denoising_start"),
        ({"denoising_end": 1.0}, "between 0 and 1"),
        ({"denoising_start": 0.0}, "leave it out"),
        ({"denoising_start": 0.999}, "leaves none"),
        ({"denoising_end": 0.01}, "leaves none"),
        ({"denoising_start": 0.8, "denoising_end": 0.8}, "start below end"),
        ({"strength": 0.3, "denoising_end": 0.6}, "leaves none"),
    ],
)
def test_parts_that_cannot_be_run(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        plan_of(SD15, "euler", 10, **{"schedule": "leading", **options})


def test_a_strength_can_be_cut_too() -> None:
    for sampler, steps in itertools.product(("ddim", "dpmpp_2m"), (10, 20)):
        part = plan_of(SD15, sampler, steps, strength=0.7, denoising_end=0.8)
        whole = plan_of(SD15, sampler, steps)
        assert part.timesteps == [t for t in whole.timesteps[-int(0.7 * steps) :] if t >= 200]
        assert part.init_alpha == part.updates[0].alpha > 0.0
