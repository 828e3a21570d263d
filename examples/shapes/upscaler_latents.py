"""The latent space of the upscaler, in closed form: two levels of averages of a large picture.

A cell of 4x4 pixels is told by the means of its four 2x2 quarters, as their Haar transform: mean, left against right,
top against bottom, diagonal, each for three colors. The mean channels are about the small picture itself, the others
say where in the cell an outline runs; the decoder makes the outline sharp again. Nothing has to be learned before a
denoiser can train, and colors keep channels of their own (see latents.py for why that matters).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CELL = 4
CHANNELS = 12
# Deviations that bring colors to unit variance and details to about one where there is an outline; in -1..1 pixels.
SCALES = (0.7, 0.3, 0.3, 0.16)
# How much an error of each channel counts in pixels, relative to the mean's: the squared scales, softened.
IMPORTANCE = (1.0, 0.4, 0.4, 0.2)


def encode_images(images: Tensor) -> Tensor:
    """Latents [B, 12, H/4, W/4] of images [B, 3, H, W] in -1..1. Channels: means of R, G, B; then the details."""
    quarters = F.avg_pool2d(images, 2)
    a, b = quarters[:, :, ::2, ::2], quarters[:, :, ::2, 1::2]
    c, d = quarters[:, :, 1::2, ::2], quarters[:, :, 1::2, 1::2]
    parts = (a + b + c + d, a - b + c - d, a + b - c - d, a - b - c + d)
    return torch.cat([part / (4 * scale) for part, scale in zip(parts, SCALES, strict=True)], dim=1)


def importance(like: Tensor) -> Tensor:
    """Weights [12, 1, 1] of the channels in a loss, of mean one."""
    weights = torch.tensor(IMPORTANCE, device=like.device).repeat_interleave(3)[:, None, None]
    return weights / weights.mean()


def outlines(latents: Tensor) -> Tensor:
    """Cells with an outline or next to one, float32 [B, 1, h, w] of 0 and 1."""
    detail = latents[:, 3:].abs().amax(1, keepdim=True) > 0.05
    return F.max_pool2d(detail.float(), 3, 1, 1)
