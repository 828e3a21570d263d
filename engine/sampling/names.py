"""Names of samplers and schedules, their aliases, and the diffusers classes they stand for. No torch."""

from __future__ import annotations

from ..errors import RequestError, closest

SAMPLERS = ("ddim", "ddpm", "euler", "euler_a", "heun", "lms", "dpmpp_2m", "pndm", "lcm")

SPACINGS = ("leading", "trailing", "linspace")
SIGMA_SCHEDULES = ("karras", "exponential", "beta", "lu")
SCHEDULES = SPACINGS + SIGMA_SCHEDULES

CLASS_NAMES = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "lms": "LMSDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "pndm": "PNDMScheduler",
    "lcm": "LCMScheduler",
}
CLASS_SAMPLERS = {cls: sampler for sampler, cls in CLASS_NAMES.items()}
"""diffusers `_class_name` -> sampler."""

SAMPLER_ALIASES = {
    "eulera": "euler_a",
    "euler_ancestral": "euler_a",
    "k_euler": "euler",
    "k_euler_a": "euler_a",
    "k_heun": "heun",
    "k_lms": "lms",
    "plms": "pndm",
    "dpm++_2m": "dpmpp_2m",
    "dpm++2m": "dpmpp_2m",
    "dpmpp2m": "dpmpp_2m",
    "k_dpmpp_2m": "dpmpp_2m",
    "dpmsolver++": "dpmpp_2m",
} | {cls.lower(): sampler for cls, sampler in CLASS_SAMPLERS.items()}

SCHEDULE_ALIASES = {"sgm_uniform": "trailing", "uniform": "leading"}


def resolve_sampler(name: str) -> str:
    """The canonical sampler of a name, an alias ("DPM++ 2M") or a diffusers class name; RequestError lists them."""
    return _resolve("sampler", name, SAMPLERS, SAMPLER_ALIASES)


def resolve_schedule(name: str) -> str:
    """The canonical schedule of a name or an alias; RequestError lists the valid ones."""
    return _resolve("schedule", name, SCHEDULES, SCHEDULE_ALIASES)


def _resolve(kind: str, name: str, valid: tuple[str, ...], aliases: dict[str, str]) -> str:
    key = "_".join(str(name).lower().replace("-", "_").split())
    key = aliases.get(key, key)
    if key not in valid:
        raise RequestError(f"unknown {kind} {name!r}; {closest(key, valid)}")
    return key
