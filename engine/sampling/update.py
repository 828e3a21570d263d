"""A sampler's table: `Update` is one line (one network evaluation), `Plan` the whole table. Host float64, no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...kernels.sampler_step.columns import Column


class Level(NamedTuple):
    """A noise level: x = alpha x0 + sigma eps, and the timestep the network is told."""

    alpha: float
    sigma: float
    timestep: float


@dataclass(frozen=True, kw_only=True)
class Update:
    """One network evaluation and the linear update after it (formulas: `kernels.sampler_step.columns.Column`).

    The network is called with `c_in * x` and `timestep`; `p`, `q` turn its output F into the denoised estimate
    D = p x + q F, where x is the unscaled state. `step` is the user's step this evaluation belongs to.
    """

    timestep: float
    alpha: float
    sigma: float
    step: int
    c_in: float = 1.0
    p: float = 0.0
    q: float = 1.0
    clamp: float = math.inf
    A: float = 0.0
    B: float = 0.0
    B_raw: float = 0.0
    G: float = 0.0
    C1: float = 0.0
    C2: float = 0.0
    C3: float = 0.0
    S: float = 0.0
    Sp: float = 0.0
    keep_base: bool = True
    A2: float = 0.0
    B2: float = 0.0
    G2: float = 0.0
    C21: float = 0.0
    C22: float = 0.0
    C23: float = 0.0
    Sp2: float = 0.0
    push: bool = False
    ex: float = 0.0
    eD: float = 0.0
    known: float = 0.0
    known_noise: float = 0.0
    threshold: float = 0.0
    v_log: float = 0.0
    v_root: float = 0.0

    def line(self) -> list[float]:
        """This update as a table line, in `Column` order."""
        values = {c: float(getattr(self, name)) for c, name in _FIELDS.items()}
        values[Column.LIVE] = 1.0
        return [values[c] for c in Column]


def evaluate_at(level: Level, step: int, **coefficients: Any) -> Update:
    """The update of step `step` whose network evaluation is at `level`; `coefficients` are fields of `Update`."""
    return Update(timestep=level.timestep, alpha=level.alpha, sigma=level.sigma, step=step, **coefficients)


# Column.SP2 -> "Sp2": the mathematics keeps its letters in `Update`, enum members are upper case.
_FIELDS: dict[Column, str] = {
    next(c for c in Column if c.name == field.upper()): field
    for field in Update.__dataclass_fields__  # every field of an Update has a column
}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The table of one request.

    The state starts as x = init_alpha * image + init_scale * unit_noise; init_alpha is 0 when sampling starts from
    pure noise. `steps` is what the user asked for, `len(updates)` the number of network evaluations.
    """

    updates: tuple[Update, ...]
    init_scale: float
    steps: int
    sampler: str
    schedule: str
    prediction_type: str
    init_alpha: float = 0.0

    @property
    def timesteps(self) -> list[float]:
        """The timestep of every update."""
        return [u.timestep for u in self.updates]

    @property
    def stochastic(self) -> bool:
        """Whether any update draws noise."""
        return any(u.S or u.Sp or u.Sp2 for u in self.updates)

    @property
    def learned_variance(self) -> bool:
        """Whether the network has to predict a variance: twice the channels of the state."""
        return any(u.v_log or u.v_root for u in self.updates)

    def inpainting(self, *, strengths: bool = False) -> Plan:
        """This plan with a known image put back after every update, where a mask says so.

        The known image is put back at the level of the next evaluation, alpha' known + sigma' noise, and after the last
        update as it is (RePaint, Lugmayr et al. 2022, equation 8 without resampling; diffusers' inpainting pipelines).
        The noise is that of the initial state: a known pixel then stays on one trajectory.

        strengths: the mask holds the strength of every pixel, as image to image has one for the whole image: at 1 a
        pixel is made anew, at 0 it stays, and otherwise it is known until step (1 - strength) steps (the change map of
        Differential Diffusion, Levin & Fried 2023, whose loop gives every pixel one evaluation more).
        """
        updates = []
        for update, following in zip(self.updates, [*self.updates[1:], None], strict=True):
            alpha, sigma = (1.0, 0.0) if following is None else (following.alpha, following.sigma)
            threshold = 1.0 - update.step / self.steps if strengths else 0.0
            updates.append(replace(update, known=alpha, known_noise=sigma, threshold=threshold))
        return replace(self, updates=tuple(updates))

    def table(self) -> NDArray[np.float64]:
        """All updates as float64 [len(updates), len(Column)]."""
        return np.array([u.line() for u in self.updates], dtype=np.float64)


def stack_tables(plans: Sequence[Plan]) -> NDArray[np.float64]:
    """The tables of several rows as float64 [rows, longest plan, len(Column)], padded with lines of zeros."""
    longest = max((len(p.updates) for p in plans), default=0)
    tables = np.zeros((len(plans), longest, len(Column)))
    for row, plan in zip(tables, plans, strict=True):
        row[: len(plan.updates)] = plan.table()
    return tables
