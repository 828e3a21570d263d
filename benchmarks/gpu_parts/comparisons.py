"""Ours against the strongest configurations of diffusers, on the same weights: an update and a decoding.

As `stepfuse bench compare --arch sd15|sdxl`: interleaved, errors beside times, no ratio over a rival that errs less.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .. import compare
from ..architectures import architecture
from .session import Session

PHASES: dict[str, Callable[..., dict[str, Any]]] = {"update": compare.update, "decode": compare.decode}
CASES = (("sd15", "update"), ("sdxl", "update"), ("sdxl", "decode"), ("sd15", "decode"))
BUDGET_S = 15.0


def run(session: Session) -> None:
    for arch, phase in (("tiny", "update"),) if session.tiny else CASES:
        if not session.measure(f"{arch} {phase}", lambda a=arch, p=phase: _measure(session, a, p)):
            return


def _measure(session: Session, arch: str, phase: str) -> dict[str, Any]:
    settings = compare.Settings(
        device=session.device, dtype=session.dtype, rounds=3 if session.tiny else 12, budget_s=BUDGET_S,
        compiled=session.cuda,
    )  # fmt: skip
    found = PHASES[phase](architecture(arch), settings)
    return {"ms": 1e3 * found["ours_s"], **found}
