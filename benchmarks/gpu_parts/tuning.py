"""Tuning (`python -m stepfuse.kernels.tune`), op by op: what dispatch reads from here on, and what the bundle carries.

Configurations are written into this checkout, so that later parts run with them, and copied to `configs/<op>/` in the
suite's folder, from where --merge brings them home; the suite puts those of an earlier run back before any part.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from ... import kernels
from ...kernels import device, launch_configs
from .session import Session

FIRST = ("attention", "group_norm_silu", "geglu", "sampler_step")
"""Most of an evaluation's time, and the one launch that every update ends with: tuned before the others."""


def run(session: Session) -> None:
    folder = session.records.parent / "configs"
    ops = sorted(kernels.__all__, key=lambda op: FIRST.index(op) if op in FIRST else len(FIRST))
    for op in ops[-1:] if session.tiny else ops:  # each in a process of its own
        if not session.measure(op, lambda name=op: _tune(session, name, folder)):
            return


def _tune(session: Session, op: str, folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", f"{kernels.__name__}.tune", "--ops", op]
    command += [] if session.cuda else ["--dry-run"]
    limit = max(5.0, session.seconds_left())
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"not through after {limit:.0f} s; nothing was written") from None
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise RuntimeError(f"exit {done.returncode}: {lines[-1] if lines else 'no output'}")
    file = launch_configs.path(op, device.name(session.device.index or 0))
    if session.cuda and file.exists():
        (folder / op).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, folder / op / file.name)
    return {"file": file.name, "lines": done.stdout.strip().splitlines()}
