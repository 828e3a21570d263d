"""Random weights for reference models: seeded by name, and never degenerate."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn


def normal(name: str, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers that depend on `name` alone, exactly representable in float32."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "little")
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def randomize(module: nn.Module, name: str) -> None:
    """Give every parameter a value that shows in the output.

    Layers that training starts at zero (ControlNet's zero convolutions) are not zero, biases and norm weights are not
    0 and 1: a parameter that is dropped or swapped cannot hide. Values are rounded to float16, so that files in half
    precision hold the same numbers.
    """
    for key, parameter in module.named_parameters():
        noise = normal(f"{name}.{key}", *parameter.shape, dtype=torch.float32)
        leaf = key.rsplit(".", 1)[-1]
        if parameter.ndim == 1 and leaf == "weight":
            value = 1 + 0.1 * noise
        elif parameter.ndim <= 1:
            value = 0.05 * noise
        elif "embedding" in key and parameter.ndim == 2 and "linear" not in key and "proj" not in key:
            value = 0.2 * noise
        else:
            value = noise / math.sqrt(math.prod(parameter.shape[1:]))
        parameter.data.copy_(value.to(torch.float16).to(parameter.dtype))
    module.eval()
