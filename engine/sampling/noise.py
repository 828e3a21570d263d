"""Noise: the initial latents (PyTorch's CPU generator, as diffusers draws them) and the update noise (Philox)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...kernels.sampler_step.reference import box_muller, philox, philox_normal, uniform

__all__ = ["box_muller", "initial_noise", "philox", "philox_normal", "uniform"]


def initial_noise(seed: int, shape: Sequence[int], n: int = 1) -> Tensor:
    """Unit noise float32 [n, C, H, W] on the CPU; image i uses seed + i. `shape` is (C, H, W).

    Each image equals `torch.randn([1, C, H, W], generator=torch.Generator("cpu").manual_seed(seed + i))`, what a
    diffusers pipeline draws for a CPU generator of that seed.
    """
    images = []
    for i in range(n):
        generator = torch.Generator("cpu").manual_seed(seed + i)
        images.append(torch.randn([1, *shape], generator=generator, dtype=torch.float32))
    return torch.cat(images)
