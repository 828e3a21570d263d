"""The parts of an engine around a network of the user's (`Engine.from_module`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .components import DEFAULTS, Components, short
from .config import EngineConfig, resolve
from .errors import CheckpointError, RequestError, closest
from .families import Family
from .runtimes.exported import FixedKernels
from .runtimes.user_network import TOLD, Pattern, Told, UserNetwork, resolve_user_prediction
from .sampling.sampler_options import BETA_SCHEDULES
from .sampling.scheduler_config import SchedulerConfig

SAMPLER = "DPMSolverMultistepScheduler"
"""What a schedule that names no class is sampled with: second order, one evaluation per step."""
STATED = {
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "clip_sample": False,
}
"""Of a schedule that does not say it itself."""
CHECKPOINT_ONLY = ("runtime", "vae_dtype", "decode_rows", "variant", "download", "vae_tiling", "transforms",
                   "controlnets", "loras", "safety")  # fmt: skip
Schedule = str | Mapping[str, Any] | SchedulerConfig | Sequence[float] | Tensor


def user_components(
    module: Callable[..., Tensor],
    shape: int | Sequence[int | None],
    config: EngineConfig,
    *,
    prediction: str = "epsilon",
    schedule: Schedule = "linear",
    time: Told | None = None,
    conditioning: int | Sequence[int | None] | None = None,
    defaults: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> Components:
    """Everything a request needs around a user's network; arguments as of `Engine.from_module`. Also for `Engine.add`.

    Raises RequestError for arguments that fit no network, and for options that only checkpoints have.
    """
    if not callable(module):
        raise RequestError(
            f"module: got {type(module).__name__}, expected a callable of (x, t) or (x, t, conditioning)"
        )
    kind = resolve_user_prediction(prediction)
    own = type(module).__name__ if isinstance(module, nn.Module) else getattr(module, "__name__", "user")
    resolved = resolve(_config(module, config))
    given = None if conditioning is None else _conditioning(conditioning)
    network = UserNetwork(module, Pattern.of("shape", shape), given, kind, _told(kind, time), resolved.dtype)
    text = "none" if given is None else "given"
    return Components(
        name=name or own,
        family=Family(
            name="user", summary="a network of the user's", text=text, latent=False, steps=25, guidance_scale=1.0
        ),
        config=resolved,
        denoiser=network,
        scheduler=_scheduler(schedule, kind if not network.converts else "epsilon"),
        text=(),
        vae=None,
        zero_negative=False,
        defaults=_defaults(defaults or {}),
        binders={"unet": FixedKernels(f"{name or own} is called as it is")},
    )


def _conditioning(axes: int | Sequence[int | None]) -> Pattern:
    pattern = Pattern.of("conditioning", axes)
    if None in pattern.axes[1:]:
        raise RequestError(f"conditioning: got {axes!r}; only the first axis may be None: pad the others to one length")
    return pattern


def _told(prediction: str, time: Told | None) -> Told:
    if time is None:
        return "flow" if prediction == "flow" else "timestep"
    if time not in TOLD:
        raise RequestError(f"time: got {time!r}, {closest(str(time), TOLD)}")
    return time


def _defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    images_only = ("width", "height", "noise_level", "null_class", "blur_per_level")
    allowed = tuple(field for field in DEFAULTS if field not in images_only)
    for field in given:
        if field not in allowed:
            raise RequestError(f"defaults: got {field!r}, {closest(field, allowed)}")
    return dict(given)


def _config(module: Any, config: EngineConfig) -> EngineConfig:
    """The configuration with the module's own device and dtype, and eager updates, where it leaves them open.

    Raises RequestError for options that only a checkpoint has, and where the module is elsewhere.
    """
    plain = EngineConfig()
    for option in CHECKPOINT_ONLY:
        if getattr(config, option) != getattr(plain, option):
            raise RequestError(f"{option}: got {getattr(config, option)!r}; a network of yours has none, leave it out")
    tensors = list(chain(module.parameters(), module.buffers())) if isinstance(module, nn.Module) else []
    devices = {str(t.device) for t in tensors}
    dtypes = {t.dtype for t in tensors if t.is_floating_point()}
    if len(devices) > 1:
        raise RequestError(f"module: its tensors are on {', '.join(sorted(devices))}; move it to one device")
    device = config.device or next(iter(devices), None)
    dtype = config.dtype or (next(iter(dtypes)) if len(dtypes) == 1 else torch.float32)
    runner = "eager" if config.runner == "auto" else config.runner
    made = replace(config, device=device, dtype=dtype, runner=runner)
    resolved = resolve(made)
    if devices and torch.device(next(iter(devices))).type != resolved.device.type:
        raise RequestError(f"device: got {resolved.device}, the module is on {next(iter(devices))}; move it there")
    if len(dtypes) == 1 and resolved.dtype not in dtypes:
        own = short(next(iter(dtypes)))
        raise RequestError(f"dtype: got {short(resolved.dtype)}, the module is {own}; convert it, or leave dtype out")
    return made


def _scheduler(schedule: Schedule, prediction: str) -> SchedulerConfig:
    """The noise levels. Raises RequestError for a schedule that cannot be read."""
    if isinstance(schedule, SchedulerConfig):
        schedule = {"_class_name": schedule.class_name, **schedule.options}
    if isinstance(schedule, str):
        if schedule not in BETA_SCHEDULES:
            raise RequestError(f"schedule: got {schedule!r}, {closest(schedule, BETA_SCHEDULES)}, or alphas_cumprod")
        schedule = {"beta_schedule": schedule}
    if not isinstance(schedule, Mapping):
        schedule = {"trained_betas": _betas(schedule)}
    stated = schedule.get("prediction_type", prediction)
    if stated != prediction:
        raise RequestError(f"schedule: its prediction_type is {stated!r}; leave it out, prediction= says it")
    # Stated, because the defaults differ between samplers: these betas, and clipping to -1..1, are of images
    options = {"_class_name": SAMPLER, **STATED, **schedule, "prediction_type": prediction}
    try:
        return SchedulerConfig.from_diffusers(options)
    except CheckpointError as error:
        raise RequestError(f"schedule: {error}") from None


def _betas(alphas_cumprod: Any) -> list[float]:
    """The betas whose running product of 1 - beta is alphas_cumprod, descending in (0, 1)."""
    values = alphas_cumprod.tolist() if isinstance(alphas_cumprod, Tensor) else list(alphas_cumprod)
    bar = np.array(values, dtype=np.float64)
    if bar.ndim != 1 or len(bar) < 2 or not ((bar > 0) & (bar < 1)).all() or not (np.diff(bar) < 0).all():
        raise RequestError("schedule: expected alphas_cumprod, at least two descending numbers between 0 and 1")
    return [1 - bar[0], *(1 - bar[1:] / bar[:-1])]
