"""`scheduler_config.json` of a checkpoint, and what it means for each sampler. No torch.

Choosing a sampler other than the checkpoint's keeps the options the file states and takes everything else from the
defaults of the diffusers class that stands for the sampler, as `OtherScheduler.from_config(config)` does. These
defaults differ: without `timestep_spacing` in the file, DDIM spaces "leading" and Euler "linspace".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

from ..errors import CheckpointError, closest
from .names import CLASS_NAMES, CLASS_SAMPLERS
from .predictions import ALIASES as PREDICTION_ALIASES
from .predictions import PREDICTIONS

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace", "exp")


@dataclass(frozen=True, kw_only=True)
class SamplerOptions:
    """Every scheduler option of one sampler, resolved. A field its diffusers class does not have keeps this default."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = 0
    rescale_betas_zero_snr: bool = False
    clip_sample: bool = False
    clip_sample_range: float = 1.0
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    set_alpha_to_one: bool = True
    variance_type: str | None = None
    interpolation_type: str = "linear"
    timestep_type: str = "discrete"
    final_sigmas_type: str = "zero"
    sigma_min: float | None = None
    sigma_max: float | None = None
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    use_lu_lambdas: bool = False
    use_flow_sigmas: bool = False
    flow_shift: float = 1.0
    use_dynamic_shifting: bool = False
    time_shift_type: str = "exponential"
    solver_order: int = 2
    algorithm_type: str = "dpmsolver++"
    solver_type: str = "midpoint"
    lower_order_final: bool = True
    euler_at_final: bool = False
    lambda_min_clipped: float = -math.inf
    skip_prk_steps: bool = False
    original_inference_steps: int = 50
    timestep_scaling: float = 10.0

    @property
    def sigma_schedule(self) -> str | None:
        """The schedule that replaces spaced timesteps, or None."""
        names = ("karras", "lu", "exponential", "beta")
        flags = (self.use_karras_sigmas, self.use_lu_lambdas, self.use_exponential_sigmas, self.use_beta_sigmas)
        return next((name for name, flag in zip(names, flags, strict=True) if flag), None)


_BETAS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "steps_offset": 0,
}
_CLIP: dict[str, Any] = {"clip_sample": True, "clip_sample_range": 1.0}
_THRESHOLD: dict[str, Any] = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
_SIGMAS: dict[str, Any] = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
_ZERO_SNR: dict[str, Any] = {"rescale_betas_zero_snr": False}
_LEADING: dict[str, Any] = {"timestep_spacing": "leading"}
_LINSPACE: dict[str, Any] = {"timestep_spacing": "linspace"}
_SD_BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012}

DEFAULTS: dict[str, dict[str, Any]] = {
    "ddim": _BETAS | _CLIP | _THRESHOLD | _ZERO_SNR | _LEADING | {"set_alpha_to_one": True},
    "ddpm": _BETAS | _CLIP | _THRESHOLD | _ZERO_SNR | _LEADING | {"variance_type": "fixed_small"},
    "euler": _BETAS
    | _SIGMAS
    | _ZERO_SNR
    | _LINSPACE
    | {
        "interpolation_type": "linear",
        "timestep_type": "discrete",
        "sigma_min": None,
        "sigma_max": None,
        "final_sigmas_type": "zero",
    },
    "euler_a": _BETAS | _ZERO_SNR | _LINSPACE,
    "heun": _BETAS | _SD_BETAS | _SIGMAS | _LINSPACE | {"clip_sample": False, "clip_sample_range": 1.0},
    "lms": _BETAS | _SIGMAS | _LINSPACE,
    "dpmpp_2m": _BETAS
    | _THRESHOLD
    | _SIGMAS
    | _ZERO_SNR
    | _LINSPACE
    | {
        "solver_order": 2,
        "algorithm_type": "dpmsolver++",
        "solver_type": "midpoint",
        "lower_order_final": True,
        "euler_at_final": False,
        "use_lu_lambdas": False,
        "use_flow_sigmas": False,
        "flow_shift": 1.0,
        "final_sigmas_type": "zero",
        "lambda_min_clipped": -math.inf,
        "variance_type": None,
        "use_dynamic_shifting": False,
        "time_shift_type": "exponential",
    },
    "pndm": _BETAS | _LEADING | {"skip_prk_steps": False, "set_alpha_to_one": False},
    "lcm": _BETAS
    | _SD_BETAS
    | _THRESHOLD
    | _ZERO_SNR
    | _LEADING
    | {
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "clip_sample_range": 1.0,
        "set_alpha_to_one": True,
        "original_inference_steps": 50,
        "timestep_scaling": 10.0,
    },
}
"""Per sampler: the options its diffusers class takes, with that class's defaults."""

COMPATIBLE_CLASSES = frozenset(CLASS_SAMPLERS) | {
    "DDIMInverseScheduler",
    "DDIMParallelScheduler",
    "DDPMParallelScheduler",
    "DEISMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "SASolverScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
}
"""diffusers schedulers over the same discrete beta schedules, whose configuration another sampler can take over."""

_OTHER_OPTIONS = frozenset(
    (
        "predict_x0",
        "solver_p",
        "disable_corrector",
        "noise_sampler_seed",
        "predictor_order",
        "corrector_order",
        "tau_func",
        "shift",
        "base_shift",
        "max_shift",
        "base_image_seq_len",
        "max_image_seq_len",
        "shift_terminal",
        "invert_sigmas",
        "gamma",
        "eta",
        "tensor_format",
        "timestep_values",
        "predict_epsilon",
        "rho",
        "sigma_data",
        "sigma_schedule",
        "snr_shift_scale",
    )
)
"""Options of those other classes (and of old files) that none of our samplers has, as none of its classes has."""

_CHOICES: dict[str, tuple[str, ...]] = {
    "beta_schedule": BETA_SCHEDULES,
    "prediction_type": (*PREDICTIONS, *PREDICTION_ALIASES),
    "timestep_spacing": ("leading", "trailing", "linspace"),
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
        """Parse `scheduler_config.json` (a dict with `_class_name`), or `scheduler.config` of a live diffusers object.

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
    if key in _OTHER_OPTIONS:
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
    if key in _CHOICES and value not in _CHOICES[key]:
        raise CheckpointError(f"scheduler option {key!r} is {value!r}; {closest(str(value), _CHOICES[key])}")
    if key in ("num_train_timesteps", "original_inference_steps", "solver_order") and value < 1:
        raise CheckpointError(f"scheduler option {key!r} is {value}; expected at least 1")
    if key in ("beta_start", "beta_end") and not 0.0 < value < 1.0:
        raise CheckpointError(f"scheduler option {key!r} is {value}; expected a number between 0 and 1")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


def _check_supported(sampler: str, o: SamplerOptions) -> None:
    where = f"sampler {sampler!r} ({CLASS_NAMES[sampler]})"
    if o.prediction_type not in ("epsilon", "v_prediction", "sample"):
        raise CheckpointError(
            f"{where}: prediction_type {o.prediction_type!r} does not go with a beta schedule; "
            "expected epsilon, v_prediction or sample"
        )
    if o.thresholding:
        raise CheckpointError(
            f"{where}: dynamic thresholding is not supported; set `thresholding: false` or take euler"
        )
    if o.variance_type in ("learned", "learned_range"):
        raise CheckpointError(
            f"{where}: a network with learned variance ({o.variance_type!r}) is not supported; take sampler='ddim'"
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
