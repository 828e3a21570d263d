"""The part of a schedule that a request runs, and what it starts from: strength, base and refiner. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real

from ..errors import RequestError
from .levels import Levels


@dataclass(frozen=True, kw_only=True)
class Portion:
    """Which steps to run; the names and rules are those of diffusers' pipelines, the defaults run everything.

    start            skip the first `start` steps
    strength         image to image: run the last min(int(steps * strength), steps) steps, from the noised image. 1 runs
                     them all, still from the image: only None starts from pure noise
    denoising_end    stop before the first timestep below round(T - denoising_end * T), T training steps (SDXL's base)
    denoising_start  begin at that timestep, with the latents another plan left there (SDXL's refiner)

    Raises RequestError for numbers out of range and for more than one of start, strength and denoising_start.
    """

    start: int = 0
    strength: float | None = None
    denoising_start: float | None = None
    denoising_end: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.start, bool) or not isinstance(self.start, int) or self.start < 0:
            raise RequestError(f"start={self.start!r}; expected an integer of at least 0")
        if self.strength is not None and not (_real(self.strength) and 0.0 < self.strength <= 1.0):
            raise RequestError(f"strength={self.strength!r}; expected a number above 0, up to 1")
        for name in ("denoising_start", "denoising_end"):
            value = getattr(self, name)
            if value is not None and not (_real(value) and 0.0 < value < 1.0):
                raise RequestError(f"{name}={value!r}; expected a number between 0 and 1, or leave it out")
        given = [name for name in ("start", "strength", "denoising_start") if getattr(self, name) not in (None, 0)]
        if len(given) > 1:
            raise RequestError(f"got both {given[0]} and {given[1]}; give one of them")
        low, high = self.denoising_start, self.denoising_end
        if low is not None and high is not None and low >= high:
            raise RequestError(f"denoising_start={low!r} and denoising_end={high!r}; expected start below end")

    def of(self, whole: Levels) -> Levels:
        """The levels to run of a whole schedule; RequestError where no step is left."""
        steps = len(whole.at)
        first, stop = self.start, steps
        if self.strength is not None:
            first = start_of(self.strength, steps)
        if self.denoising_start is not None:
            first = cut_of(self.denoising_start, whole)
        if self.denoising_end is not None:
            stop = cut_of(self.denoising_end, whole)
        if first >= stop:
            given = ", ".join(f"{k}={v!r}" for k, v in vars(self).items() if v not in (None, 0))
            raise RequestError(f"{given} leaves none of the {steps} steps; use more steps or a larger part of them")
        return whole.part(first, stop)

    def initial(self, levels: Levels) -> tuple[float, float]:
        """(init_alpha, init_scale): what the levels start from is init_alpha image + init_scale unit noise."""
        if self.denoising_start is not None:
            return 1.0, 0.0
        if self.strength is None and levels.start == 0:
            return 0.0, levels.init_scale
        return levels.at[0].alpha, levels.at[0].sigma


def _real(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def start_of(strength: float, steps: int) -> int:
    """The step at which image to image of a strength, 0 to 1, starts; `steps` where it runs none."""
    return steps - min(int(steps * strength), steps)


def cut_of(fraction: float, levels: Levels) -> int:
    """The first step behind a cut after `fraction` of the training timesteps: its timestep is below the cut.

    Whole steps are counted. diffusers counts evaluations, and so cuts Heun between the two of a step.
    """
    count = levels.schedule.count
    cut = round(count - fraction * count)
    return sum(at.timestep >= cut for at in levels.at)
