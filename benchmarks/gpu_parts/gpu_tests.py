"""The test suite's GPU tests, file by file, where there is a GPU; records what passed, failed and was skipped.

Most of their time is compilation: with pytest-xdist installed, eight processes share it.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .session import Session

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = ("-v", "-m", "gpu", "-p", "no:cacheprovider", "--import-mode=importlib")
PROCESSES = 8
OUTCOME = re.compile(r"\b(PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b")


def run(session: Session) -> None:
    found = files()
    for file in found[-1:] if session.tiny else found:
        if not session.measure(f"pytest -m gpu {file}", lambda f=file: _pytest(session, f)):
            return


def files(root: Path = ROOT) -> list[str]:
    """Test files with GPU tests, the ops' contract first."""
    found = sorted(p for p in (root / "tests").glob("test_*.py") if "pytest.mark.gpu" in p.read_text())
    return [p.relative_to(root).as_posix() for p in sorted(found, key=lambda p: "contract" not in p.name)]


def _pytest(session: Session, file: str) -> dict[str, Any]:
    command = [sys.executable, "-P", "-m", "pytest", *OPTIONS, file]
    if session.tiny:
        command += ["--collect-only"]
    elif session.cuda and find_spec("xdist"):
        command += ["-n", str(PROCESSES)]
    limit = max(5.0, session.seconds_left() - 5)
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired as late:
        counts = outcomes((late.stdout or b"").decode(errors="replace").splitlines())
        raise RuntimeError(f"not through after {limit:.0f} s: {counts or 'no test'}") from None
    lines = (done.stdout or done.stderr).strip().splitlines()
    return {
        "exit": done.returncode,
        "outcomes": outcomes(lines),
        "summary": lines[-1] if lines else "",
        "failures": [line for line in lines if line.startswith(("FAILED", "ERROR"))][:50],
    }


def outcomes(lines: list[str]) -> dict[str, int]:
    """How many tests passed, failed, were skipped, from pytest's verbose lines (with or without xdist's prefix)."""
    tests = (line for line in lines if "::" in line and not line.startswith(("FAILED", "ERROR", "SKIPPED")))
    return dict(Counter(match[1].lower() for line in tests if (match := OUTCOME.search(line))))
