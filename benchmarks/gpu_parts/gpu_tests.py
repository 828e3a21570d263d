"""The test suite's GPU tests, run where there is a GPU; records what passed, failed and was skipped."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from .session import Session

ROOT = Path(__file__).resolve().parents[2]


def run(session: Session) -> None:
    if (ROOT / "tests").is_dir():
        session.measure("pytest -m gpu", lambda: _pytest(session))


def _pytest(session: Session) -> dict[str, Any]:
    command = [
        sys.executable,
        "-P",
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        "--import-mode=importlib",
    ]
    if session.tiny:
        command += ["--collect-only"]
    limit = max(5.0, session.seconds_left() - 5)
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired as late:
        lines = (late.stdout or b"").decode(errors="replace").strip().splitlines()
        raise RuntimeError(f"not through after {limit:.0f} s: {lines[-1] if lines else 'no output'}") from None
    lines = (done.stdout or done.stderr).strip().splitlines()
    return {"exit": done.returncode, "summary": lines[-1] if lines else "", "failures": _failures(lines)}


def _failures(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith(("FAILED", "ERROR"))][:50]
