"""A network of the user's behind the interface of ours: any callable of (x, t) or (x, t, conditioning).

The engine's latents are [R, C, h, w]. A sample of any shape is one channel of them, its first axis the height and all
others together the width: every element is a site of its own, which a mask can keep.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import RequestError, closest
from ..models.unet import Conditioning
from ..models.unet_config import BlockOptions, Level, UNetConfig
from ..sampling.predictions import ALIASES
from ..sampling.update import Plan, Update

Told = Literal["timestep", "sigma", "flow"]
TOLD = ("timestep", "sigma", "flow")
NATIVE = ("epsilon", "v_prediction", "sample")
"""What a sampler's table reads itself; the others are converted to epsilon."""
PREDICTIONS = (*NATIVE, "score", "flow")


@dataclass(frozen=True)
class Pattern:
    """The shape of a tensor of one row; None where requests choose: the first axis, and one of the others."""

    axes: tuple[int | None, ...]

    @classmethod
    def of(cls, name: str, axes: int | Sequence[int | None]) -> Pattern:
        """From what a user says. Raises RequestError for what is no shape, or leaves open too much."""
        given = (axes,) if isinstance(axes, int) else tuple(axes)
        whole = all(a is None or (isinstance(a, int) and not isinstance(a, bool) and a >= 1) for a in given)
        if not whole or given[1:].count(None) > 1:
            raise RequestError(
                f"{name}: got {axes!r}, expected whole numbers >= 1, or None for the first axis and one of the others"
            )
        return cls(given)

    @property
    def fixed(self) -> tuple[int, ...] | None:
        """The shape, where nothing is open."""
        return None if None in self.axes else tuple(axis or 0 for axis in self.axes)

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a row may have this shape."""
        return len(shape) == len(self.axes) and all(
            own is None or own == got for own, got in zip(self.axes, shape, strict=True)
        )

    def fold(self, rows: Tensor) -> Tensor:
        """Rows [R, *shape] as latents [R, 1, h, w]."""
        return rows.reshape(len(rows), 1, *folded(rows.shape[1:]))

    def unfold(self, latents: Tensor) -> Tensor:
        """Latents [R, 1, h, w] as rows [R, *shape]."""
        height, width = latents.shape[-2:]
        if not self.axes:
            return latents.reshape(len(latents))
        known = math.prod([axis or 1 for axis in self.axes[1:]])  # a list, for torch.compile
        rest = [width // known if axis is None else axis for axis in self.axes[1:]]
        return latents.reshape(len(latents), height, *rest)

    def __str__(self) -> str:
        return "[" + ", ".join("any" if axis is None else str(axis) for axis in self.axes) + "]"


def folded(shape: Sequence[int]) -> tuple[int, int]:
    """Height and width of the latents that hold a tensor of this shape."""
    return (shape[0] if shape else 1), math.prod(shape[1:])


@dataclass(frozen=True, kw_only=True)
class UserInputs:
    """What the rows of a user's network are evaluated with. All tensors lead with the rows."""

    time: Tensor  # [R, U, 4]: what the network is told, scale of its input, and eps = a x + b F as (a, b)
    conditioning: Tensor | None = None  # [R, *]

    @staticmethod
    def cat(parts: Sequence[UserInputs]) -> UserInputs:
        """The rows of all parts, which share one table."""
        given = [part.conditioning for part in parts if part.conditioning is not None]
        time = torch.cat([part.time for part in parts])
        return UserInputs(time=time, conditioning=torch.cat(given) if given else None)


class UserNetwork(nn.Module):
    """Calls the user's module, as it is, with x [R, *shape] and t [R], and conditioning [R, *] where it takes one.

    x is the state at unit variance, alpha x0 + sigma eps with alpha^2 + sigma^2 = 1, for "flow" (1 - t) x0 + t eps. t
    is float: `told` the timestep of the schedule, sigma / alpha ("sigma"), or sigma / (alpha + sigma) ("flow").
    """

    def __init__(
        self,
        module: Callable[..., Tensor],
        pattern: Pattern,
        conditioning: Pattern | None,
        prediction: str,
        told: Told,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.module, self.pattern, self.conditioning = module, pattern, conditioning
        self.prediction, self.told, self._dtype = prediction, told, dtype
        self.converts = prediction not in NATIVE
        self.config = _structure(pattern, conditioning)

    @property
    def dtype(self) -> torch.dtype:
        """dtype x is given in."""
        return self._dtype

    @property
    def time_dtype(self) -> torch.dtype:
        """dtype of t: that of the sampler's state."""
        return torch.float64 if self._dtype == torch.float64 else torch.float32

    def times(self, plan: Plan) -> Tensor:
        """[U, 4] of a plan, as in `UserInputs.time`."""
        return torch.tensor([self._line(update) for update in plan.updates], dtype=self.time_dtype)

    def prepare(self, conditioning: Conditioning, timesteps: Tensor) -> UserInputs:
        """timesteps: [R, U, 4], of `times`."""
        given = conditioning.hidden
        if given is not None:  # one dtype for all requests, whose rows share tensors; labels are whole numbers in it
            given = given.to(self._dtype if given.is_floating_point() else self.time_dtype)
        return UserInputs(time=timesteps, conditioning=given)

    def forward(self, latents: Tensor, prepared: UserInputs, update: Tensor) -> Tensor:
        """latents [R, 1, h, w], update int64 [R], its line. Raises RequestError for an output of another shape."""
        index = update[:, None, None].expand(-1, 1, prepared.time.shape[2])
        told, scale, a, b = prepared.time.gather(1, index)[:, 0].unbind(1)
        x = latents * _sites(scale, latents) if self.converts else latents
        x = self.pattern.unfold(x).to(self._dtype)  # the state's buffers have the dtype of t
        if prepared.conditioning is None:
            output = self.module(x, told)
        else:
            assert self.conditioning is not None
            rows = prepared.conditioning.reshape(-1, *prepared.conditioning.shape[1 : 1 + len(self.conditioning.axes)])
            output = self.module(x, told, rows)
        if not isinstance(output, Tensor) or output.shape != x.shape:
            got = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
            raise RequestError(f"the module returned {got} for x {tuple(x.shape)}; expected a tensor of the same shape")
        output = output.reshape(latents.shape).to(latents.dtype)
        return _sites(a, latents) * latents + _sites(b, latents) * output if self.converts else output

    def _line(self, update: Update) -> tuple[float, float, float, float]:
        norm, total = math.hypot(update.alpha, update.sigma), update.alpha + update.sigma
        told = {
            "timestep": update.timestep,
            "sigma": update.sigma / update.alpha if update.alpha else math.inf,
            "flow": update.sigma / total,
        }[self.told]
        if self.prediction == "score":  # eps = -sigma grad log p(x)
            return told, 1.0, 0.0, -update.sigma / norm
        if self.prediction == "flow":  # F = eps - x0 at (1 - t) x0 + t eps, so eps = that state + (1 - t) F
            return told, norm / total, norm / total, update.alpha / total
        return told, 1.0, 0.0, 1.0


def resolve_user_prediction(name: str) -> str:
    """The canonical name. Raises RequestError for a prediction that is not read."""
    found = ALIASES.get(name, name)
    if found not in PREDICTIONS:
        raise RequestError(f"prediction: got {name!r}, {closest(str(name), PREDICTIONS)}")
    return found


def _sites(rows: Tensor, latents: Tensor) -> Tensor:
    """A number per row, for every site of it."""
    return rows[:, None, None, None].to(latents.dtype)


def _structure(pattern: Pattern, conditioning: Pattern | None) -> UNetConfig:
    """What the engine asks of a network's structure: one channel in and out, the size, the width of conditioning."""
    width = None if conditioning is None else math.prod(axis or 1 for axis in conditioning.axes[1:])
    return UNetConfig(
        in_channels=1,
        out_channels=1,
        sample_size=None if pattern.fixed is None else folded(pattern.fixed),
        down=(Level(channels=1, layers=1),),
        middle=None,
        up=(),
        blocks=BlockOptions(groups=1, eps=0.0),
        sinusoid_dim=0,
        sine_first=True,
        frequency_shift=0.0,
        time_dim=0,
        text_dim=width,
    )
