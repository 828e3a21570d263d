"""Exceptions of the engine: every message says what it got, what it expected and what to do."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterable


class StepfuseError(Exception):
    """Base of every error stepfuse raises on purpose. `exit_code` is what the command line returns for it."""

    exit_code = 1


class RequestError(StepfuseError, ValueError):
    """A request or option has a value that cannot be honoured."""

    exit_code = 2


class CheckpointError(StepfuseError, ValueError):
    """A checkpoint is missing, incomplete, of an unknown kind, or does not fit the model."""

    exit_code = 3


class DeviceError(StepfuseError, RuntimeError):
    """The device asked for is absent or cannot run what was asked."""

    exit_code = 4


class NumericsError(StepfuseError, ArithmeticError):
    """NaN or Inf appeared in weights, latents or images."""

    exit_code = 5


class Cancelled(StepfuseError):
    """The job was cancelled before it finished."""

    exit_code = 6


class EngineClosed(StepfuseError, RuntimeError):
    """The engine was closed; it accepts no more requests."""

    exit_code = 1


class QueueFull(StepfuseError, RuntimeError):
    """More work is queued than the bound allows; nothing was queued.

    retry_after: seconds until the same work would be taken; estimated_wait: seconds until all that is queued is done.
    """

    exit_code = 7

    def __init__(self, message: str, *, estimated_wait: float = 0.0, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.estimated_wait, self.retry_after = estimated_wait, retry_after


class DeadlineMissed(StepfuseError, TimeoutError):
    """The deadline of a request passed before the request started."""

    exit_code = 8


class MemoryBudgetError(StepfuseError, MemoryError):
    """The request needs more device memory than the budget has."""

    exit_code = 9


def located(error: BaseException, where: str) -> StepfuseError:
    """The error with the place it came from before its message: of its own kind where that is one of ours."""
    if not isinstance(error, StepfuseError):
        return StepfuseError(f"{where}: {type(error).__name__}: {error}")
    made = copy.copy(error)  # others may hold the same one
    made.args = (f"{where}: {error}",)
    return made


def closest(name: str, valid: Iterable[str]) -> str:
    """A suffix for an error message: the nearest valid name if there is one, then all of them."""
    names = sorted(valid)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}valid: {', '.join(names)}"
