"""`scheduler_config.json` of a checkpoint, and what it means for each sampler. No torch.

Choosing a sampler other than the checkpoint's keeps the options the file states and takes everything else from the
defaults of the diffusers class that stands for the sampler, as `OtherScheduler.from_config(config)` does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

from ..errors import CheckpointError, closest
from .dynamic_threshold import DynamicThreshold
from .names import CLASS_NAMES, CLASS_SAMPLERS
from .predictions import ALIASES as PREDICTION_ALIASES
from .predictions import PREDICTIONS
from .sampler_options import BETA_SCHEDULES, COMPATIBLE_CLASSES, DEFAULTS, OTHER_OPTIONS, SamplerOptions

__all__ = ["SamplerOptions", "SchedulerConfig"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "beta_schedule": BETA_SCHEDULES,
    "prediction_type": (*PREDICTIONS, *PREDICTION_ALIASES),
    "timestep_spacing": ("leading", "trailing", "linspace"),
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"),
    "interpolation_type": ("linear", "log_linear"),
    "timestep_type": ("discrete", "continuous"),
    "final_sigmas_type": ("zero", "sigma_min"),
}
_TYPES = {f.name: str(f.type) for f in fields(SamplerOptions)}


@dataclass(frozen=True)
class SchedulerConfig:
    """The scheduler a checkpoint was saved with: its diffusers class and the options the file states."""

    class_name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> SchedulerConfig:
        """Parse `scheduler_config.json`, or the `config` of a live diffusers object with its `_class_name` added.

        Options a live object only took from its defaults (`_use_default_values`) are dropped, as `from_config` drops
        them. Raises CheckpointError for a missing or unsupported class, an unknown option or a bad value.
        """
        name = config.get("_class_name")
        if not isinstance(name, str):
            raise CheckpointError(
                f"scheduler_config.json: `_class_name` is {name!r}; expected one of {', '.join(CLASS_SAMPLERS)}"
            )
        if name not in COMPATIBLE_CLASSES:
            raise CheckpointError(f"scheduler class {name!r} is not supported; {closest(name, COMPATIBLE_CLASSES)}")
        defaulted = config.get("_use_default_values") or ()
        options = {k: v for k, v in config.items() if not k.startswith("_") and k not in defaulted}
        for key, value in options.items():
            _check(key, value)
        return cls(name, MappingProxyType(options))

    @property
    def sampler(self) -> str | None:
        """The sampler the checkpoint was saved with, None when it is one stepfuse does not have."""
        return CLASS_SAMPLERS.get(self.class_name)

    def resolve(self, sampler: str, **overrides: Any) -> SamplerOptions:
        """The options of `sampler`: class defaults, then what the file states, then `overrides`.

        Raises CheckpointError when the file asks this sampler for something stepfuse does not do.
        """
        accepted = DEFAULTS[sampler]
        stated = {k: v for k, v in self.options.items() if k in accepted}
        # diffusers reads these two off the whole configuration, also in classes that do not declare them.
        ends = {k: v for k, v in self.options.items() if k in ("sigma_min", "sigma_max")}
        values = accepted | ends | stated | overrides
        values["prediction_type"] = PREDICTION_ALIASES.get(values["prediction_type"], values["prediction_type"])
        if values["trained_betas"] is not None:
            values["trained_betas"] = tuple(float(b) for b in values["trained_betas"])
            values["num_train_timesteps"] = len(values["trained_betas"])
        options = SamplerOptions(**values)
        _check_supported(sampler, options)
        return options


def _check(key: str, value: Any) -> None:
    """One option of the file: known, of the right type, in range."""
    if key in OTHER_OPTIONS:
        if key == "predict_epsilon" and not value:
            raise CheckpointError('`predict_epsilon: false` is an old spelling; write `prediction_type: "sample"`')
        return
    if key not in _TYPES:
        raise CheckpointError(f"unknown scheduler option {key!r}; {closest(key, _TYPES)}")
    kind = _TYPES[key]
    if value is None:
        ok = "None" in kind or kind == "bool"
    elif "tuple" in kind:
        ok = isinstance(value, list | tuple) and all(_is_number(b) and 0.0 <= b < 1.0 for b in value) and len(value) > 0
    elif "bool" in kind:
        ok = isinstance(value, bool)
    elif "int" in kind:
        ok = isinstance(value, int) and not isinstance(value, bool)
    elif "float" in kind:
        ok = _is_number(value)
    else:
        ok = isinstance(value, str)
    if not ok:
        raise CheckpointError(f"scheduler option {key!r} is {value!r}; expected {kind}")
    if key in _CHOICES and value is not None and value not in _CHOICES[key]:
        raise CheckpointError(f"scheduler option {key!r} is {value!r}; {closest(str(value), _CHOICES[key])}")
    _check_range(key, value)


def _check_range(key: str, value: Any) -> None:
    if key in ("num_train_timesteps", "original_inference_steps", "solver_order") and value < 1:
        raise CheckpointError(f"scheduler option {key!r} is {value}; expected at least 1")
    if key in ("beta_start", "beta_end") and not 0.0 < value < 1.0:
        raise CheckpointError(f"scheduler option {key!r} is {value}; expected a number between 0 and 1")
    if key == "steps_offset" and value < 0:
        raise CheckpointError(f"scheduler option {key!r} is {value}; expected at least 0")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


def _check_supported(sampler: str, o: SamplerOptions) -> None:
    where = f"sampler {sampler!r} ({CLASS_NAMES[sampler]})"
    if o.prediction_type not in ("epsilon", "v_prediction", "sample"):
        raise CheckpointError(
            f"{where}: prediction_type {o.prediction_type!r} does not go with a beta schedule; "
            "expected epsilon, v_prediction or sample"
        )
    if o.thresholding and not DynamicThreshold(o.dynamic_thresholding_ratio, o.sample_max_value).valid:
        raise CheckpointError(
            f"{where}: dynamic_thresholding_ratio {o.dynamic_thresholding_ratio} and sample_max_value "
            f"{o.sample_max_value}; expected a ratio above 0, up to 1, and a value of at least 1"
        )
    if sum((o.use_karras_sigmas, o.use_exponential_sigmas, o.use_beta_sigmas)) > 1:
        raise CheckpointError(
            f"{where}: only one of use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas may be true"
        )
    if o.use_flow_sigmas or o.use_dynamic_shifting:
        raise CheckpointError(f"{where}: flow-matching sigmas are not supported with a beta schedule checkpoint")
    if sampler == "dpmpp_2m" and o.algorithm_type not in ("dpmsolver++", "sde-dpmsolver++", "deis"):
        raise CheckpointError(
            f"{where}: algorithm_type {o.algorithm_type!r} is not supported; use 'dpmsolver++' or 'sde-dpmsolver++'"
        )
    if sampler == "dpmpp_2m" and o.solver_order > 3:
        raise CheckpointError(f"{where}: solver_order {o.solver_order} is not supported; use 1, 2 or 3")
