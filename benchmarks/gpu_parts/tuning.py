"""Tuning (`python -m stepfuse.kernels.tune`), op by op: what dispatch reads from here on, and what the bundle carries.

Configurations are written into this checkout, so that later parts run with them, and copied to `configs/<op>/` in the
suite's folder, from where --merge brings them home. Those of an earlier run are put back first.
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


def run(session: Session) -> None:
    folder = session.records.parent / "configs"
    install(folder, launch_configs.ROOT)
    for op in kernels.__all__:
        if not session.measure(op, lambda name=op: _tune(session, name, folder)):
            return


def install(folder: Path, root: Path) -> list[Path]:
    """Copy configs/<op>/X of an earlier run to <op>/configs/X below `root`; returns what was written."""
    written = []
    for file in sorted(folder.glob("*/*.json")):
        target = root / file.parent.name / "configs" / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
        written.append(target)
    return written


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
