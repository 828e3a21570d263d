"""Guidance as weights: the guided prediction is sum_j w_j F_j over the branches (cond, uncond, ...) of each row."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def uses_guidance(scale: float) -> bool:
    """Whether a guidance scale needs an unconditional branch. At 1 and below, as in diffusers, none is evaluated."""
    return scale > 1.0


def cfg_weights(scales: Sequence[float] | Tensor) -> Tensor:
    """Classifier-free guidance u + g (c - u) as float32 weights [R, 2] for branches (cond, uncond): (g, 1 - g).

    Rows without guidance (g <= 1) get (1, 0), so that they can share a batch with guided ones.
    """
    g = torch.as_tensor(scales, dtype=torch.float32)
    g = torch.where(g > 1.0, g, torch.ones_like(g))
    return torch.stack((g, 1.0 - g), dim=-1)


def rescale_weights(model_output: Tensor, weights: Tensor, rescale: Tensor) -> Tensor:
    """Weights float32 [R, J] whose sum has its standard deviation pulled towards the conditional branch's.

    model_output any float [R, J, C, H, W], branch 0 conditional; weights [R, J]; rescale [R], the paper's phi, 0 to 1:
    w (phi std(F_0) / std(sum_j w_j F_j) + 1 - phi) (Lin et al. 2023, equations 15 and 16). Rows with phi = 0 keep their
    weights exactly. The deviation is each row's own, over C, H, W.
    """
    w = weights.to(torch.float32)
    guided = torch.zeros_like(model_output[:, 0], dtype=torch.float32)
    for j in range(model_output.shape[1]):
        wj = w[:, j].reshape(-1, 1, 1, 1)
        guided = guided + torch.where(wj == 0, 0.0, wj * model_output[:, j].to(torch.float32))
    cond = model_output[:, 0].to(torch.float32)
    ratio = cond.flatten(1).std(dim=1) / guided.flatten(1).std(dim=1)
    phi = rescale.to(torch.float32)
    factor = torch.where(phi == 0, 1.0, phi * ratio + 1.0 - phi)
    return w * factor.unsqueeze(1)


def guidance_embedding(scale: Sequence[float] | Tensor, dim: int) -> Tensor:
    """Sinusoids of 1000 (g - 1), float32 [R, dim]: how guidance-distilled networks (LCM) are told the scale g.

    The first half sines, the second cosines, of frequencies 10000^(-i / (dim // 2 - 1)); a last zero if dim is odd
    (Meng et al. 2023; diffusers `get_guidance_scale_embedding`, which is given g - 1).
    """
    w = 1000.0 * (torch.as_tensor(scale, dtype=torch.float32).reshape(-1, 1) - 1.0)
    half = dim // 2
    frequencies = torch.exp(
        torch.arange(half, dtype=torch.float32, device=w.device) * -(math.log(10000.0) / (half - 1))
    )
    angles = w * frequencies
    return torch.nn.functional.pad(torch.cat((angles.sin(), angles.cos()), dim=1), (0, dim % 2))
