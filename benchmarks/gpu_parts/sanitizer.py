"""Three kernels under NVIDIA's compute-sanitizer: accesses out of bounds (memcheck), then shared-memory races.

Each kernel runs in a process of its own on its contract cases, with PyTorch's caching allocator off: inside a cached
block a write beyond a tensor would go unseen. Where the tool is missing or refuses the device, the record says why.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from .session import Session

TOOL = "compute-sanitizer"
FOLDERS = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")
CHECKS = ("memcheck", "racecheck")
SUMMARY = re.compile(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)")
NOT_RUN = "not run"


def run(session: Session) -> None:
    from .sanitized import KERNELS

    tool = find()
    for check in CHECKS:
        for kernel in KERNELS:
            if not session.measure(f"{check} {kernel}", lambda c=check, k=kernel: _measure(session, tool, c, k)):
                return


def find() -> str | None:
    """The tool's path: on PATH, or in a folder of the CUDA toolkit."""
    return shutil.which(TOOL) or next(filter(None, (shutil.which(TOOL, path=folder) for folder in FOLDERS)), None)


def command(tool: str, check: str, kernel: str) -> list[str]:
    """The command that checks one kernel."""
    module = f"{__package__}.sanitized"
    watched = [tool, "--tool", check, "--target-processes", "application-only", sys.executable, "-m", module, kernel]
    return ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", *watched]


def verdict(output: str, code: int) -> dict[str, Any]:
    """What the tool found: "clean", "errors" (with their count and first lines), or "not run" and why.

    output: of tool and program together; code: the exit status. Clean needs the tool's own summary of none and a
    program that ran to its end with right results.
    """
    lines = [line for line in output.splitlines() if line.strip()]
    found = [int(a or b) for a, b in SUMMARY.findall(output)]
    if not found:
        reason = next((line for line in lines if "not supported" in line.lower()), lines[-1] if lines else "no output")
        return {"verdict": NOT_RUN, "reason": f"exit {code}: {reason.lstrip('= ')}"[:400]}
    if max(found):
        return {"verdict": "errors", "errors": max(found), "lines": _reports(lines)}
    if code:
        return {"verdict": "program failed", "lines": [line for line in lines if not line.startswith("===")][-5:]}
    return {"verdict": "clean", "errors": 0}


def _reports(lines: Sequence[str]) -> list[str]:
    return [line.lstrip("= ") for line in lines if line.startswith("===")][:40]


def _measure(session: Session, tool: str | None, check: str, kernel: str) -> dict[str, Any]:
    if not session.cuda:
        return {"verdict": NOT_RUN, "reason": f"{TOOL} watches CUDA kernels, the device is {session.device}"}
    if tool is None:
        places = " or ".join(("PATH", *FOLDERS))
        return {"verdict": NOT_RUN, "reason": f"no {TOOL} on {places}: it comes with the CUDA toolkit"}
    limit = max(10.0, session.seconds_left())
    try:
        done = subprocess.run(
            command(tool, check, kernel),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=limit,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"not through after {limit:.0f} s") from None
    return {"tool": tool, **verdict(done.stdout, done.returncode)}
