"""What the machine has: Triton, a CUDA device, its architecture."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch


@cache
def has_triton() -> bool:
    """Whether Triton can be imported; without it every op is its torch reference."""
    return find_spec("triton") is not None


@cache
def name(index: int = 0) -> str:
    """A file-name-safe name of a CUDA device ("NVIDIA_H200"), or "cpu"."""
    return torch.cuda.get_device_name(index).replace(" ", "_") if torch.cuda.is_available() else "cpu"


@cache
def sm(index: int = 0) -> int:
    """Compute capability as a number (90 for Hopper); 0 without CUDA."""
    if not torch.cuda.is_available():
        return 0
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor
