"""Every option a scheduler file can have, and the defaults of each sampler's diffusers class. Tables, no torch.

The defaults differ between classes: without `timestep_spacing` in the file, DDIM spaces "leading" and Euler "linspace".
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .names import CLASS_SAMPLERS

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

OTHER_OPTIONS = frozenset(
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
