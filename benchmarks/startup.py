"""Time to the first image: from the start of a process to a picture on disk."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from . import harness


def measure(model: str, options: dict[str, Any], repeats: int = 3) -> dict[str, Any]:
    """Start `stepfuse generate` `repeats` times; seconds from the start of the process to when its PNG was written.

    options: of the command line, such as {"steps": 20, "device": "cpu"}; None is left out. The first start also reads
    the weights from disk, later ones find them in the system's cache. Raises RuntimeError with what the process said
    where it fails.
    """
    package = __name__.partition(".")[0]
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        for index in range(repeats):
            picture = Path(folder) / f"{index}.png"
            command = [sys.executable, "-m", package, "-q", "generate", "a red circle", "--model", model]
            for name, value in {**options, "seed": 0, "output": picture}.items():
                command += [] if value is None else [f"--{name}", str(value)]
            start = time.time_ns()
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
                raise RuntimeError(f"`generate` ended with code {done.returncode}: {said}")
            seconds.append(1e-9 * (picture.stat().st_mtime_ns - start))
    return {"first_s": seconds[0], "p50_s": harness.percentile(seconds, 50), "seconds": seconds}
