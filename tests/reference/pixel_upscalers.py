"""Small pixel models and upscalers of pixels as diffusers folders, and the plain loop that samples an upscaler."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import scipy.ndimage
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .networks import DOWN, SELF_DOWN, SELF_UP, UP
from .random_weights import randomize
from .schedulers import make, precision

NETWORK: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": (16, 32),
    "down_block_types": (DOWN, SELF_DOWN),
    "up_block_types": (SELF_UP, UP),
    "layers_per_block": 1,
    "norm_num_groups": 8,
}
UPSCALER = NETWORK | {"in_channels": 6, "class_embed_type": "timestep"}
SAMPLER: dict[str, Any] = {"_class_name": "DDIMScheduler", "beta_schedule": "linear", "clip_sample": False}
NOISING: dict[str, Any] = {"_class_name": "DDPMScheduler", "beta_schedule": "squaredcos_cap_v2"}


def save(
    folder: Path,
    network: dict[str, Any],
    *,
    noising: str | None = None,
    says: dict[str, Any] | None = None,
    **options: Any,
) -> nn.Module:
    """Save a pipeline of a UNet2DModel and its schedulers; the network in float32.

    noising: the name of the scheduler of the low-resolution image; says: stepfuse.json; options: of model_index.json.
    """
    unet = diffusers.UNet2DModel(**network)
    randomize(unet, folder.name)
    unet.save_pretrained(folder / "unet")
    index: dict[str, Any] = {"_class_name": "DiffusionPipeline", "unet": ["diffusers", "UNet2DModel"], **options}
    for name, config in {"scheduler": SAMPLER, **({noising: NOISING} if noising else {})}.items():
        cls = config["_class_name"]
        getattr(diffusers, cls).from_config(config).save_pretrained(folder / name)
        index[name] = ["diffusers", cls]
    (folder / "model_index.json").write_text(json.dumps(index))
    if says is not None:
        (folder / "stepfuse.json").write_text(json.dumps(says))
    return unet


def beside(image: np.ndarray, size: tuple[int, int], dtype: torch.dtype, sigma: float = 0.0) -> Tensor:
    """What stands beside the noisy image before noise [1, 3, *size], of an image [h, w, 3] in 0..1."""
    pixels = image.astype(np.float64) * 2 - 1
    if sigma:
        pixels = scipy.ndimage.gaussian_filter(pixels, sigma, mode="reflect", truncate=4.0, axes=(0, 1))
    return F.interpolate(torch.from_numpy(pixels).permute(2, 0, 1)[None].to(dtype), size, mode="bilinear")


def sample(
    unet: nn.Module,
    low: Tensor,
    seed: int,
    steps: int,
    *,
    level: int | None = None,
    noised: bool = True,
    label: int | None = None,
    null: int | None = None,
    guidance: float = 1.0,
) -> Tensor:
    """One image [1, 3, H, W] by the loop a pipeline would have, in the dtype of `low` [1, 3 or 0, H, W].

    level: of `low`, which the network is told; label: told in its place. The noise of `low` is drawn before that of x.
    """
    dtype, generator = low.dtype, torch.Generator().manual_seed(seed)
    if level is not None and noised:
        noise = torch.randn(low.shape, generator=generator).to(dtype)
        low = make(diffusers.DDPMScheduler, NOISING, dtype).add_noise(low, noise, torch.tensor([level]))
    x = torch.randn((1, 3, *low.shape[2:]), generator=generator).to(dtype)
    scheduler, told = make(diffusers.DDIMScheduler, SAMPLER, dtype), level if label is None else label
    unet = unet.to(dtype)
    hook = unet.time_proj.register_forward_hook(lambda *args: args[2].to(dtype))  # of the level: else float32

    def predict(told: int | None) -> Tensor:
        labels = None if told is None else torch.tensor([told])
        return unet(torch.cat([x, low], 1), t, class_labels=labels).sample

    with precision(type(scheduler), dtype), torch.no_grad():
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps:
            output = predict(told)
            output = output if null is None else predict(null) + guidance * (output - predict(null))
            x = scheduler.step(output, t, x).prev_sample
    hook.remove()
    return x
