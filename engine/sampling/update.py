"""A sampler's table: `Update` is one line (one network evaluation), `Plan` the whole table. Host float64, no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...kernels.sampler_step.columns import Column
from ..errors import RequestError
from .dynamic_threshold import DynamicThreshold


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
    pure noise, 1 with init_scale 0 when it goes on from given latents. `steps` is what the user asked for,
    `len(updates)` the number of network evaluations. `arrivals` are the levels the steps of the plan arrive at; `cut`
    is the level of the next evaluation where the plan ends before the schedule does, else None. dynamic_threshold: of
    every estimate D, in place of the clamp of the updates.
    """

    updates: tuple[Update, ...]
    init_scale: float
    steps: int
    sampler: str
    schedule: str
    prediction_type: str
    arrivals: tuple[Level, ...]
    init_alpha: float = 0.0
    cut: Level | None = None
    dynamic_threshold: DynamicThreshold | None = None

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
        for update, following in zip(self.updates, [*self.updates[1:], self.cut], strict=True):
            alpha, sigma = (1.0, 0.0) if following is None else (following.alpha, following.sigma)
            threshold = (self.steps - update.step) / self.steps if strengths else 0.0
            updates.append(replace(update, known=alpha, known_noise=sigma, threshold=threshold))
        return replace(self, updates=tuple(updates))

    def repaint(self, jump_length: int = 10, jump_n_sample: int = 10) -> Plan:
        """Inpainting with resampling: the steps in `resampling_order`, noise added wherever the order goes back.

        An update before a jump takes x to its own level (alpha', sigma') and up to the level (alpha, sigma) of the next
        evaluation in one: x <- r x' + sqrt(sigma^2 - r^2 sigma'^2) xi, r = alpha / alpha' (Lugmayr et al. 2022,
        algorithm 1, line 10). Both noises are normal, so one of their common deviation is drawn.

        The known image is put back as `inpainting` does, with the same noise in every resampling; RePaint draws new
        noise. The mean of what is painted stays the same, its deviation grows: on two correlated normal pixels by 9 to
        17 %.

        Raises RequestError for jumps that do not fit the plan, for samplers with a history or several evaluations in a
        step, and for a learned variance, which no deviation of two noises can express.
        """
        if len(self.updates) != len(self.arrivals) or any(
            u.C1 or u.C2 or u.C3 or u.G or u.Sp or u.v_log or u.v_root for u in self.updates
        ):
            raise RequestError(
                f"resampling with sampler {self.sampler!r}: its steps use what earlier evaluations left, or a learned "
                "variance, or are resampled already; take ddim, ddpm, euler, euler_a or lcm, with a fixed variance"
            )
        order = resampling_order(len(self.updates), jump_length, jump_n_sample)
        updates = []
        for now, then in zip(order, [*order[1:], len(self.updates)], strict=True):
            update = self.updates[now]
            if then <= now:
                update = _raised(update, self.arrivals[now], self.updates[then])
            updates.append(update)
        return replace(self, updates=tuple(updates)).inpainting()

    def table(self) -> NDArray[np.float64]:
        """All updates as float64 [len(updates), len(Column)]."""
        return np.array([u.line() for u in self.updates], dtype=np.float64)


def _raised(update: Update, arrival: Level, target: Update) -> Update:
    """`update`, which arrives at `arrival`, with the noise added that takes the state on to the level of `target`."""
    ratio = target.alpha / arrival.alpha
    added = math.sqrt(max(target.sigma**2 - (ratio * arrival.sigma) ** 2, 0.0))
    scaled = {name: ratio * getattr(update, name) for name in ("A", "B", "B_raw")}
    return replace(update, **scaled, S=math.hypot(ratio * update.S, added))


def resampling_order(steps: int, jump_length: int, jump_n_sample: int) -> list[int]:
    """The order in which RePaint runs `steps` steps, each by its index (Lugmayr et al. 2022, figure 9).

    With t = 0 for the last step: after step t = 0, j, 2 j ... below steps - j the state goes back up by j = jump_length
    steps, jump_n_sample - 1 times each. Raises RequestError where no jump would fit.
    """
    for name, value, top in (("jump_length", jump_length, steps - 1), ("jump_n_sample", jump_n_sample, None)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1 or (top is not None and value > top):
            limit = "at least 1" if top is None else f"from 1 to {top}, one less than the steps"
            raise RequestError(f"{name}={value!r}; expected an integer {limit}")
    jumps, order, t = dict.fromkeys(range(0, steps - jump_length, jump_length), jump_n_sample - 1), [], steps
    while t >= 1:
        t -= 1
        order.append(steps - 1 - t)
        if jumps.get(t, 0) > 0:
            jumps[t] -= 1
            t += jump_length
    return order


def stack_tables(plans: Sequence[Plan]) -> NDArray[np.float64]:
    """The tables of several rows as float64 [rows, longest plan, len(Column)], padded with lines of zeros."""
    longest = max((len(p.updates) for p in plans), default=0)
    tables = np.zeros((len(plans), longest, len(Column)))
    for row, plan in zip(tables, plans, strict=True):
        row[: len(plan.updates)] = plan.table()
    return tables
