"""Right before fast: the error of an implementation against float64, beside that of torch in the same dtype.

Green is: error <= 2 x error of torch + 1e-7 max|truth|, for every output; values that are not floating point are equal.
A variant whose gate is red gets no speed-up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Gate:
    """The verdict; `error` and `allowed` are those of the output that comes closest to, or lies farthest over, it."""

    green: bool
    error: float
    allowed: float

    def record(self) -> dict[str, Any]:
        """As a mapping for a JSON record."""
        return asdict(self)


def tensors(result: Any) -> tuple[torch.Tensor, ...]:
    """What an op returned, as a tuple."""
    return result if isinstance(result, tuple) else (result,)


def truth(reference: Callable[..., Any], arguments: Mapping[str, Any]) -> tuple[torch.Tensor, ...]:
    """The reference's outputs for the same values in float64."""
    exact = {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }
    return tensors(reference(**exact))


def judge(found: Sequence[torch.Tensor], plain: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> Gate:
    """Compare `found` with `exact`; `plain` is what torch computes in the dtype of `found`."""
    verdicts = [_judge(*three) for three in zip(found, plain, exact, strict=True)]
    return max(verdicts, key=lambda gate: (not gate.green, gate.error / gate.allowed if gate.allowed else gate.error))


def _judge(found: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> Gate:
    if found.shape != exact.shape:
        return Gate(False, float("inf"), 0.0)
    if not exact.is_floating_point():
        wrong = float((found != exact).sum())
        return Gate(wrong == 0, wrong, 0.0)
    if exact.numel() == 0:
        return Gate(True, 0.0, 0.0)
    error = float((found.double() - exact).abs().max())
    allowed = 2 * float((plain.double() - exact).abs().max()) + 1e-7 * float(exact.abs().max())
    return Gate(error <= allowed, error, allowed)  # NaN is not <=
