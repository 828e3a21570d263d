"""What a part is given: the device, its deadline, what earlier runs already measured, and where records go."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import harness

# What one measurement may raise without ending its part: out of memory, an unsupported dtype or backend, no package.
MEASUREMENT_ERRORS = (RuntimeError, ValueError, NotImplementedError, ImportError, AttributeError, TypeError, KeyError)


@dataclass
class Session:
    """One part's run. `tiny` asks for the smallest shapes that still run every line of the part."""

    part: str
    records: Path
    device: torch.device
    tiny: bool
    deadline: float
    finished: set[str] = field(default_factory=set)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16

    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def measure(self, key: str, call: Callable[[], Mapping[str, Any]]) -> bool:
        """Record what `call` returns under `key`, or the error it raised. False when the part's time is over.

        A key that an earlier run recorded without an error is not measured again.
        """
        if self.seconds_left() <= 0:
            return False
        if key in self.finished:
            return True
        start = time.monotonic()
        try:
            facts = dict(call())
        except MEASUREMENT_ERRORS as error:
            facts = {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:400]}
        self.write(key, **facts, wall_s=round(time.monotonic() - start, 3))
        return True

    def write(self, key: str, **facts: Any) -> None:
        harness.append(self.records, {"part": self.part, "key": key, "time": harness.now(), **facts})


def relative_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    """max|value - truth| / max|truth| in float64."""
    value, truth = value.double(), truth.double()
    return float((value - truth).abs().max() / truth.abs().max().clamp_min(1e-300))
