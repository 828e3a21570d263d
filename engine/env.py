"""Environment variables, which are read here only (a bad value raises), and the machine's memory."""

from __future__ import annotations

import math
import os
from pathlib import Path

from .errors import RequestError


def cache_dir() -> Path:
    """STEPFUSE_CACHE: where measured records are kept; default: stepfuse in XDG_CACHE_HOME, which is ~/.cache."""
    if own := os.environ.get("STEPFUSE_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stepfuse"


def cublas_workspace() -> str:
    """CUBLAS_WORKSPACE_CONFIG: cuBLAS's buffers, read by cuBLAS when it starts; empty if unset."""
    return os.environ.get("CUBLAS_WORKSPACE_CONFIG", "")


def num_threads() -> int | None:
    """STEPFUSE_NUM_THREADS: CPU threads torch may use; default: torch's own choice."""
    value = os.environ.get("STEPFUSE_NUM_THREADS")
    if not value:
        return None
    if not value.isdecimal() or int(value) < 1:
        raise RequestError(f"STEPFUSE_NUM_THREADS: got {value!r}, expected a whole number >= 1; unset it or correct it")
    return int(value)


def physical_memory() -> float:
    """Bytes of this machine; infinite where the system does not say."""
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):  # no sysconf on Windows
        return math.inf
