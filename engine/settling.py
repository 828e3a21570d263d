"""What a request leaves open, decided and checked against the model before anything runs."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from . import imaging
from .components import DEFAULTS_FILE, Components
from .controls import describe, settle_controls
from .errors import CheckpointError, RequestError
from .imaging import Pictures
from .loras import Asked
from .prompting import check_prompts
from .request import Control, Request
from .runtimes.user_network import folded
from .samples import require_negative, sample_shape
from .sampling.planning import make_plan
from .sampling.update import Plan

AWAY = ("negative_prompt", "negative_prompt_2", "negative_prompt_embeds", "negative_pooled_prompt_embeds",
        "negative_conditioning", "guidance_rescale")  # fmt: skip
"""Fields that only guidance reads."""


@dataclass(frozen=True, eq=False)
class Settled:
    """A request with every open value decided and checked against the model.

    controls: with their pictures read, float32 [height, width, 3] in 0..1. pictures: those it starts from. portion:
    the part of the schedule it runs. shape: of a sample, where the network is the user's. loras: in the order of their
    loading.
    """

    request: Request
    plan: Plan
    width: int
    height: int
    guidance_scale: float
    seeds: tuple[int, ...]
    branches: int
    warnings: tuple[str, ...]
    controls: tuple[Control, ...] = ()
    pictures: Pictures = field(default_factory=Pictures)
    portion: Mapping[str, float | None] = field(default_factory=dict)
    shape: tuple[int, ...] | None = None
    loras: Asked = ()

    @property
    def control_names(self) -> tuple[str, ...]:
        """Names of its ControlNets, in order."""
        return tuple(control.name for control in self.controls)

    @property
    def settings(self) -> dict[str, Any]:
        """The resolved values a person would want to know, plain and JSON-able."""
        return {
            "steps": self.plan.steps,
            "guidance_scale": self.guidance_scale,
            "sampler": self.plan.sampler,
            "schedule": self.plan.schedule,
            **({"width": self.width, "height": self.height} if self.shape is None else {"shape": list(self.shape)}),
            **{name: value for name, value in self.portion.items() if value is not None},
            **({"dynamic_threshold": threshold.said} if (threshold := self.plan.dynamic_threshold) else {}),
            **({"controls": [describe(control) for control in self.controls]} if self.controls else {}),
            **({"loras": [list(pair) for pair in self.loras]} if self.loras else {}),
            **({"upscale": self.request.upscale} if self.request.upscale else {}),
        }


def settle(parts: Components, request: Request) -> Settled:
    """Decide what the request left open; raises RequestError for what this model cannot do, and CheckpointError where
    the scheduler's settings ask for a variance that the denoiser does not predict.
    """
    request = replace(request, output=request.output or ("pil" if parts.user is None else "pt"))
    _check_inputs(parts, request)
    check_prompts(parts, request)
    shape = None if parts.user is None else sample_shape(parts.user, request)
    pictures = imaging.read_pictures(parts, request)
    natural, resized = imaging.natural_size(parts, pictures)
    width, height = _size(parts, request, natural) if shape is None else folded(shape)[::-1]
    pictures = imaging.fit(parts, pictures, width, height)
    portion = imaging.portion(parts, request, pictures)
    defaults = parts.defaults
    guidance = _first(request.guidance_scale, defaults.get("guidance_scale"), parts.family.guidance_scale)
    given = None if request.sigmas is None else len(request.sigmas) - 1
    plan = make_plan(
        parts.scheduler,
        steps=_first(request.steps, given, defaults.get("steps"), parts.family.steps),
        sampler=request.sampler or defaults.get("sampler"),
        schedule=request.schedule,
        sigmas=request.sigmas,
        eta=request.eta,
        s_churn=request.s_churn,
        s_tmin=request.s_tmin,
        s_tmax=request.s_tmax,
        s_noise=request.s_noise,
        dynamic_threshold=request.dynamic_threshold,
        **portion,
    )
    _check_threshold(parts, request, plan)
    plan = imaging.edited(parts, request, plan)
    if plan.learned_variance and parts.denoiser.config.out_channels != 2 * parts.channels:
        raise CheckpointError(
            f"{parts.name}: the scheduler's settings ask for a learned variance, but the denoiser predicts "
            f"{parts.denoiser.config.out_channels} channels, not {2 * parts.channels}; set "
            'variance_type to "fixed_small" in scheduler_config.json'
        )
    branches = _branches(parts, guidance)
    warnings = list(resized) if (width, height) == natural else []
    warnings += _unused(parts, request, branches)
    if branches == 2 and parts.user is not None:
        require_negative(parts.name, request)
    controls = settle_controls(parts.controlnets, request.controls, width, height)
    loras = parts.loras.settle(request.loras)
    first = secrets.randbelow(2**32) if request.seed is None else request.seed
    seeds = tuple(first + i for i in range(request.n))
    said = tuple(warnings)
    decided = (request, plan, width, height, guidance, seeds, branches, said, controls, pictures, portion, shape, loras)
    return Settled(*decided)


def _check_inputs(parts: Components, request: Request) -> None:
    texts = ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2", "prompt_embeds", "negative_prompt_embeds",
             "pooled_prompt_embeds", "negative_pooled_prompt_embeds", "clip_skip")  # fmt: skip
    if parts.user is not None:
        return
    if parts.family.enlarges and parts.config.runtime != "torch":
        raise RequestError(
            f"runtime={parts.config.runtime!r}: {parts.name} is an upscaler, which runs from its checkpoint with "
            "runtime='torch' only"
        )
    if parts.family.text == "none":
        for name in texts:
            if getattr(request, name) is not None:
                raise RequestError(
                    f"{name}: {parts.name} takes no text; leave it out"
                    + (" or give class_labels" if parts.classes else "")
                )
        return
    if (request.prompt is None) == (request.prompt_embeds is None):
        raise RequestError("prompt: give either prompt or prompt_embeds, and not both")
    if request.class_labels is not None:
        raise RequestError(f"class_labels: {parts.name} is conditioned on text; leave them out")
    if request.prompt is None and request.prompt_2 is not None:
        raise RequestError("prompt_2: prompt_embeds hold what both text encoders make; leave it out")
    if len(parts.text) < 2 and (request.prompt_2 is not None or request.negative_prompt_2 is not None):
        raise RequestError(f"prompt_2: {parts.name} has only one text encoder; leave it out")


def _unused(parts: Components, request: Request, branches: int) -> list[str]:
    """What the request says and nothing reads, as warnings."""
    said = list[str]()
    if branches == 1:
        values = {name: getattr(request, name) for name in AWAY}
        given = [name for name, value in values.items() if isinstance(value, torch.Tensor) or value]
        why = "without guidance (guidance_scale <= 1, or a distilled model)"
        said += [f"{name} has no effect {why}" for name in given]
    if (request.guidance_scale or 0) > 1 and not parts.guided and parts.denoiser.config.time_cond_dim is None:
        said.append(f"guidance_scale has no effect: {parts.name} has nothing to be guided away from")
    if not request.s_churn:
        kept = {"s_tmin": 0.0, "s_tmax": math.inf, "s_noise": 1.0}
        said += [f"{name} has no effect without s_churn" for name, own in kept.items() if getattr(request, name) != own]
    elif request.s_tmin > request.s_tmax:
        said.append(f"s_churn has no effect: no level lies between s_tmin={request.s_tmin} and s_tmax={request.s_tmax}")
    return said


def _branches(parts: Components, guidance: float) -> int:
    if guidance > 1 and parts.classes and parts.null_class is None:
        raise RequestError(
            f"guidance_scale: got {guidance}, but {parts.name} does not say which class stands for none; use 1, or set "
            f"null_class in its {DEFAULTS_FILE}"
        )
    return 2 if guidance > 1 and parts.guided else 1


def _check_threshold(parts: Components, request: Request, plan: Plan) -> None:
    if plan.dynamic_threshold is None or not parts.family.latent:
        return
    why = f"{parts.name} samples latents, which have no range of values to be kept to"
    if request.dynamic_threshold is None:
        raise CheckpointError(f"{why}, but its scheduler_config.json has `thresholding: true`; set it to false")
    raise RequestError(f"dynamic_threshold: {why}; leave it out")


def _size(parts: Components, request: Request, natural: tuple[int, int] | None) -> tuple[int, int]:
    sample, own = parts.denoiser.config.sample_size or (64, 64), natural or (None, None)
    width = _first(request.width, own[0], parts.defaults.get("width"), sample[1] * parts.scale)
    height = _first(request.height, own[1], parts.defaults.get("height"), sample[0] * parts.scale)
    for name, value in (("width", width), ("height", height)):
        if value % parts.scale:
            near = max(parts.scale, round(value / parts.scale) * parts.scale)
            raise RequestError(f"{name}: got {value}, expected a multiple of {parts.scale}; the nearest is {near}")
    if request.latents is not None:
        if not isinstance(request.latents, torch.Tensor):
            raise RequestError(f"latents: got {type(request.latents).__name__}, expected a tensor [n, C, h, w]")
        expected = (request.n, parts.channels, height // parts.scale, width // parts.scale)
        if tuple(request.latents.shape) != expected:
            raise RequestError(f"latents: got shape {tuple(request.latents.shape)}, expected {expected} [n, C, h, w]")
    return width, height


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)
