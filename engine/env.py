"""Environment variables: the only file that reads os.environ. A bad value raises."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import RequestError


def cache_dir() -> Path:
    """STEPFUSE_CACHE: where measured records are kept; default ~/.cache/stepfuse."""
    return Path(os.environ.get("STEPFUSE_CACHE") or Path.home() / ".cache" / "stepfuse")


def num_threads() -> int | None:
    """STEPFUSE_NUM_THREADS: CPU threads torch may use; default: torch's own choice."""
    value = os.environ.get("STEPFUSE_NUM_THREADS")
    if not value:
        return None
    if not value.isdecimal() or int(value) < 1:
        raise RequestError(f"STEPFUSE_NUM_THREADS: got {value!r}, expected a whole number >= 1; unset it or correct it")
    return int(value)
