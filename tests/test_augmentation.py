"""The noise on an upscaler's low-resolution image: diffusers' add_noise, and its moments."""

from __future__ import annotations

import itertools
from typing import Any

import diffusers
import pytest
import torch
from reference.sampling import draw
from reference.schedulers import make

from stepfuse.engine.errors import RequestError
from stepfuse.engine.sampling.augmentation import augmentation_level
from stepfuse.engine.sampling.scheduler_config import SchedulerConfig

# As the x4 upscaler of Stable Diffusion 2 and the upscalers of unCLIP and IF are saved.
X4 = {"_class_name": "DDPMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.0001, "beta_end": 0.02}
COSINE = {"_class_name": "DDPMScheduler", "beta_schedule": "squaredcos_cap_v2", "clip_sample": True}
BORROWED = {**X4, "_class_name": "DEISMultistepScheduler"}


@pytest.mark.parametrize("config", [X4, COSINE, BORROWED])
@pytest.mark.parametrize("noise_level", [0, 20, 350, 999])
def test_the_noised_image_is_that_of_diffusers(config: dict[str, Any], noise_level: int) -> None:
    theirs = make(diffusers.DDPMScheduler, config, torch.float64)
    image, noise = draw(2)
    alpha, sigma, timestep = augmentation_level(SchedulerConfig.from_diffusers(config), noise_level)
    expected = theirs.add_noise(image, noise, torch.tensor([noise_level]))
    assert (alpha * image + sigma * noise - expected).abs().max() <= 1e-12
    assert timestep == noise_level


def test_the_level_keeps_unit_variance_and_loses_the_image() -> None:
    """Of an image of unit variance: var z = 1 at every level, and the share of the image, its alpha, only falls."""
    levels = [augmentation_level(SchedulerConfig.from_diffusers(X4), t) for t in range(0, 1000, 37)]
    assert [at.alpha**2 + at.sigma**2 for at in levels] == pytest.approx([1.0] * len(levels), rel=1e-14)
    assert all(a.alpha > b.alpha for a, b in itertools.pairwise(levels))
    assert levels[0].sigma == pytest.approx(0.01, rel=1e-9)  # the root of the first beta: no level is clean


@pytest.mark.parametrize(
    ("noise_level", "highest", "top"),
    [(-1, None, 999), (1000, None, 999), (351, 350, 350), (True, None, 999), (1000, 2000, 999)],
)
def test_levels_out_of_range(noise_level: int, highest: int | None, top: int) -> None:
    with pytest.raises(RequestError, match=f"from 0 to {top}"):
        augmentation_level(SchedulerConfig.from_diffusers(X4), noise_level, highest=highest)
