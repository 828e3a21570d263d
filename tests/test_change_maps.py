"""Differential Diffusion (Levin & Fried 2023): a strength for every pixel, against SDEdit and the published loop."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from reference.sampling import SHAPE, draw, network, run, worst
from torch import Tensor

from stepfuse.engine.sampling.planning import make_plan
from stepfuse.engine.sampling.scheduler_config import SchedulerConfig
from stepfuse.engine.sampling.update import Plan

CONFIG = SchedulerConfig.from_diffusers(
    {
        "_class_name": "EulerDiscreteScheduler",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "timestep_spacing": "leading",
        "steps_offset": 1,
        "clip_sample": False,
    }
)
STEPS = 8  # a power of two: multiples of 1 / STEPS and their differences are exact
IMAGE, NOISE, *NOISES = draw(STEPS * 2 + 4, 5)
KNOWN = torch.stack((IMAGE, NOISE), 1)
MAP = torch.arange(15, dtype=torch.float64).reshape(1, 1, *SHAPE[2:]) / 14
ALONE = ("ddim", "ddpm", "euler", "euler_a", "heun", "lcm")
"""Samplers without a history, which image to image would start without."""


def plan_of(sampler: str, **options: Any) -> Plan:
    return make_plan(CONFIG, steps=STEPS, sampler=sampler, **options)


def changed(sampler: str, strengths: Tensor) -> list[Tensor]:
    """The states of a run in which every pixel has its own strength."""
    plan = plan_of(sampler, strength=1.0).inpainting(strengths=True)
    start = plan.init_alpha * IMAGE + plan.init_scale * NOISE
    return run(plan, start, network, NOISES, mask=strengths, known=KNOWN)


@pytest.mark.parametrize("eighths", range(1, STEPS + 1))
@pytest.mark.parametrize("sampler", ALONE)
def test_a_constant_map_is_image_to_image_of_that_strength(sampler: str, eighths: int) -> None:
    plan = plan_of(sampler, strength=eighths / STEPS)
    start = plan.init_alpha * IMAGE + plan.init_scale * NOISE
    found = changed(sampler, torch.full_like(MAP, eighths / STEPS))
    skipped = len(found) - len(plan.updates)
    alone = run(plan, start, network, NOISES[skipped : skipped + len(plan.updates)])
    assert worst(found[skipped:], alone) <= 1e-12


@pytest.mark.parametrize("sampler", [*ALONE, "lms", "dpmpp_2m"])
def test_a_map_of_zeros_keeps_the_image_and_one_of_ones_is_no_map(sampler: str) -> None:
    assert torch.equal(changed(sampler, torch.zeros_like(MAP))[-1], IMAGE)
    plan = plan_of(sampler, strength=1.0)
    free = run(plan, plan.init_alpha * IMAGE + plan.init_scale * NOISE, network, NOISES)
    assert worst(changed(sampler, torch.ones_like(MAP)), free) == 0.0


def published(sampler: str, change: Tensor) -> Tensor:
    """The loop of the authors' pipelines: before evaluation i, pixels with map > i / steps are the noised image again,
    where the map is 1 - strength; nothing is put back after the last."""
    plan = plan_of(sampler, strength=1.0)
    keep = 1.0 - change
    levels = [(u.alpha, u.sigma) for u in plan.updates]
    plan = plan.inpainting()  # puts the image at the level of the next evaluation where the mask is 0
    x = levels[0][0] * IMAGE + levels[0][1] * NOISE
    masks = iter([(keep <= i / STEPS).double() for i in range(1, STEPS)] + [torch.ones_like(keep)])
    for i, u in enumerate(plan.updates):
        x = run(replace(plan, updates=(u,)), x, network, NOISES[i : i + 1] * 2, mask=next(masks), known=KNOWN)[-1]
    return x


@pytest.mark.parametrize("sampler", ["ddim", "euler_a"])
def test_the_published_loop_gives_every_pixel_one_evaluation_more(sampler: str) -> None:
    """It is ours with a map that is 1 / steps stronger."""
    change = torch.arange(15, dtype=torch.float64).reshape(MAP.shape) / 16
    theirs = published(sampler, change)
    assert worst([changed(sampler, change + 1.0 / STEPS)[-1]], [theirs]) <= 1e-12
    ours = changed(sampler, change)[-1]
    assert worst([ours], [theirs]) > 1e-3
    assert torch.equal(ours[..., 0, 0], IMAGE[..., 0, 0])  # strength 0, which the published loop changes, too
    assert not torch.equal(theirs[..., 0, 0], IMAGE[..., 0, 0])


def test_a_map_and_a_strength_count_the_same_steps() -> None:
    """A pixel joins at the step that image to image of its strength starts with, as float32 and float64 round it."""
    for steps in (1, 3, 7, 10, 20, 30, 50):
        updates = make_plan(CONFIG, steps=steps, sampler="euler").inpainting(strengths=True).updates
        for kept in range(1, steps + 1):
            for kind in (np.float32, np.float64):
                joined = next(u.step for u in updates if kind(kept / steps) >= kind(u.threshold))
                assert joined == steps - kept
