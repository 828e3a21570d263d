"""diffusers schedulers as test truth: in float32 as they ship, or in float64 by replacing the dtype names they use."""

from __future__ import annotations

import contextlib
import importlib
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor

diffusers.utils.logging.set_verbosity_error()

Network = Callable[[Tensor, float], Tensor]


class _Substitute(types.ModuleType):
    """A module with some attributes replaced."""

    def __init__(self, module: types.ModuleType, **replaced: Any) -> None:
        super().__init__(module.__name__)
        self.__dict__.update(_module=module, **replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_module"], name)


@contextlib.contextmanager
def precision(cls: type, dtype: torch.dtype, noises: Sequence[Tensor] = ()) -> Iterator[None]:
    """Within the context `cls` computes in `dtype` and draws `noises`, in order, instead of random numbers."""
    module = sys.modules[cls.__module__] if cls.__module__ in sys.modules else importlib.import_module(cls.__module__)
    draws = iter(noises)
    substitutes: dict[str, Any] = {"randn_tensor": lambda shape, **_: next(draws).to(dtype)}
    if dtype == torch.float64:
        substitutes["torch"] = _Substitute(torch, float32=torch.float64)
        substitutes["np"] = _Substitute(np, float32=np.float64)
    saved = {name: vars(module)[name] for name in substitutes if name in vars(module)}
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        for name in saved:
            setattr(module, name, substitutes[name])
        yield
    finally:
        for name, value in saved.items():
            setattr(module, name, value)
        torch.set_default_dtype(default)


def make(cls: Any, config: dict[str, Any], dtype: torch.dtype, **changed: Any) -> Any:
    """`cls.from_config(config, **changed)`, its tables in `dtype`."""
    with precision(cls, dtype):
        return cls.from_config(config, **changed)


def trajectory(
    scheduler: Any,
    steps: int,
    unit_noise: Tensor,
    network: Network,
    noises: Sequence[Tensor] = (),
    after: Callable[[int, Tensor], Tensor] = lambda i, x: x,
    **step_options: Any,
) -> tuple[list[float], list[Tensor]]:
    """Timesteps and the state after every step, float64, of the pipelines' denoising loop over `network`.

    `after(i, x)` is what the pipeline does to the state after step i.
    """
    dtype = unit_noise.dtype
    states, timesteps = [], []
    with precision(type(scheduler), dtype, noises):
        scheduler.set_timesteps(steps)
        x = unit_noise * scheduler.init_noise_sigma
        for i, t in enumerate(scheduler.timesteps):
            out = network(scheduler.scale_model_input(x, t), float(t))
            x = after(i, scheduler.step(out, t, x, return_dict=False, **step_options)[0])
            states.append(x.double())
            timesteps.append(float(t))
    return timesteps, states
