"""The noise of `shapes`: its levels, how timesteps are drawn, and the loss of networks that predict v.

v = sqrt(a) noise - sqrt(1 - a) latents (Salimans & Ho 2022), linear betas, timesteps stratified over the batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import DDIMScheduler
from torch import Tensor

SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "clip_sample": False,
    "set_alpha_to_one": True,
    "steps_offset": 1,
}
ALPHAS = DDIMScheduler(**SCHEDULER).alphas_cumprod
NEAR = -0.46  # of the distance channels: cells with an outline within some four pixels, or inside
OBJECT_WEIGHT = 2.0


def object_weight(fraction: float) -> float:
    """How much more the cells of objects count; fades out because it makes backgrounds unclean."""
    return OBJECT_WEIGHT * max(0.0, 1 - fraction / 0.85)


def stratified(places: Tensor) -> Tensor:
    """Timesteps int64 [B] in 0..999, each drawn within its B-th of them; places: which one, a permutation of 0..B-1."""
    return (1000 * (places + torch.rand(len(places))) / len(places)).long().clamp(max=999)


def add_noise(latents: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """Noisy latents and v, both as `latents` [B, C, h, w]; the noise is torch's, drawn on the CPU."""
    noise = torch.randn(latents.shape).to(latents.device)
    alphas = ALPHAS.to(latents.device)[timesteps, None, None, None]
    signal, spread = alphas.sqrt(), (1 - alphas).sqrt()
    return signal * latents + spread * noise, signal * noise - spread * latents


def velocity_loss(predict: Callable[[Tensor, Tensor], Tensor], latents: Tensor, weight: float) -> Tensor:
    """Mean squared error of what `predict` makes of noisy latents and timesteps; draws both.

    latents: [B, 8, 8, 8], exact; their device is where all is computed. weight: how much more cells of objects count.
    """
    timesteps = stratified(torch.arange(len(latents))).to(latents.device)
    noisy, v = add_noise(latents, timesteps)
    with torch.autocast(latents.device.type, torch.bfloat16):
        output = predict(noisy, timesteps)
    weights = 1 + weight * (latents[:, 3:].amax(1, keepdim=True) > NEAR)
    return (weights * (output.float() - v) ** 2).mean() / weights.mean()
