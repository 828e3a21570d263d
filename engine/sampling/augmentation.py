"""Conditioning augmentation: the noise on the low-resolution image that an upscaler is conditioned on. No torch."""

from __future__ import annotations

from ..errors import RequestError
from .scheduler_config import SchedulerConfig
from .schedules import NoiseSchedule
from .update import Level


def augmentation_level(config: SchedulerConfig, noise_level: int, *, highest: int | None = None) -> Level:
    """How to noise an image that conditions a network: z = alpha image + sigma noise, told as timestep `noise_level`.

    Cascaded diffusion (Ho et al. 2021, section 4.2): the upscaler sees a low-resolution image at a noise level of its
    own beside that of x. `config` is the scheduler of that noise, whose betas differ from the sampler's: of the x4
    upscaler `low_res_scheduler`, elsewhere `image_noising_scheduler`. `highest` is the largest level the network was
    trained for (the x4 upscaler's `max_noise_level`); by default all training timesteps.

    Level 0 is the first training timestep, not the clean image. Raises RequestError for a level out of range.
    """
    schedule = NoiseSchedule.from_options(config.resolve(config.sampler or "ddpm"))
    top = schedule.count - 1 if highest is None else min(highest, schedule.count - 1)
    if isinstance(noise_level, bool) or not isinstance(noise_level, int) or not 0 <= noise_level <= top:
        raise RequestError(f"noise_level={noise_level!r}; expected an integer from 0 to {top}")
    return schedule.level(noise_level)
