"""The low-resolution image of an upscaler: blurred, enlarged, and noised to the level that the network is told.

Conditioning augmentation (Ho et al. 2021, "Cascaded Diffusion Models", section 4.2): in training the image beside the
noisy one was made worse on purpose, so that what an earlier stage gets wrong is not taken for detail.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .components import NOISING, Components
from .errors import RequestError
from .request import Request
from .sampling.augmentation import augmentation_level

NOISE_LEVEL = 20
"""Where neither request nor checkpoint says one (diffusers' default); of levels that are blurs it is 0."""
MOST_BLUR = 64.0
"""Standard deviation in pixels: the work grows with it."""
BRIGHTNESS = (0.299, 0.587, 0.114)


def noise_level(parts: Components, request: Request) -> int:
    """The level an upscaler is told. Raises RequestError for one it does not know."""
    small = parts.low_resolution
    assert small is not None
    unsaid = NOISE_LEVEL if small.scheduler is not None else 0
    level = parts.defaults.get("noise_level", unsaid) if request.noise_level is None else request.noise_level
    if small.scheduler is not None:
        augmentation_level(small.scheduler, level, highest=small.highest)
        return level
    assert small.blur_per_level is not None
    top = int(MOST_BLUR / small.blur_per_level)
    top = top if small.highest is None else min(top, small.highest)
    if isinstance(level, bool) or not isinstance(level, int) or not 0 <= level <= top:
        raise RequestError(f"noise_level={level!r}; expected an integer from 0 to {top}, a blur for {parts.name}")
    return level


def check_augmentation(parts: Components, request: Request) -> None:
    """Raise RequestError for a blur or a noise level that this upscaler's image cannot have."""
    if request.blur is not None:
        number = isinstance(request.blur, (int, float)) and not isinstance(request.blur, bool)
        if not number or not 0 <= request.blur <= MOST_BLUR:
            raise RequestError(f"blur: got {request.blur!r}, expected 0 to {MOST_BLUR:g} pixels")
    if parts.augments:
        noise_level(parts, request)
    elif request.noise_level is not None:
        raise RequestError(
            f"noise_level: {parts.name} was trained without one (it has no {' or '.join(NOISING)}); leave it out"
        )


def enlarged_size(parts: Components, width: int, height: int) -> tuple[int, int]:
    """(width, height) of the result where the request says none: an upscaler of latents enlarges by the pixels per
    latent, one of pixels to the size it was trained at.
    """
    if parts.vae is not None:
        return width * parts.scale, height * parts.scale
    high, wide = parts.denoiser.config.sample_size or (64, 64)
    return parts.defaults.get("width", wide), parts.defaults.get("height", high)


def check_enlarges(parts: Components, size: tuple[int, int], width: int, height: int) -> None:
    """Raise RequestError for an image of `size` (width, height) that an upscaler of pixels would have to shrink."""
    if parts.vae is None and (size[0] > width or size[1] > height):
        raise RequestError(
            f"image: got {size[0]} x {size[1]} pixels for a result of {width} x {height}; {parts.name} enlarges: give "
            "a smaller image, or a larger width and height"
        )


def is_noised(parts: Components) -> bool:
    """Whether its levels are noise."""
    return parts.low_resolution is not None and parts.low_resolution.scheduler is not None


def enlarged(parts: Components, request: Request, images: Sequence[np.ndarray], width: int, height: int) -> Tensor:
    """What the network is given beside the latents, before noise: [R, C, h, w] in -1..1 on the engine's device.

    images: float32 [H, W, 3] in 0..1. A pixel upscaler's come as they are and are enlarged here to width x height;
    a latent one's have one pixel per latent site already.
    """
    dtype = torch.float64 if parts.config.dtype == torch.float64 else torch.float32
    device, levels = parts.config.device, parts.low_resolution
    sigma = float(request.blur or 0.0)
    if levels is not None and levels.blur_per_level is not None:
        sigma = math.hypot(sigma, levels.blur_per_level * noise_level(parts, request))
    channels = parts.channels if parts.vae is None else images[0].shape[-1]
    made = [blur(to_tensor([image], channels).to(device, dtype), sigma) for image in images]
    return torch.cat([_enlarge(one, width, height) if parts.vae is None else one for one in made])


def noised(parts: Components, request: Request, images: Tensor, noise: Tensor | None) -> Tensor:
    """Images [R, C, h, w] at the request's level: alpha image + sigma noise."""
    scheduler = None if parts.low_resolution is None else parts.low_resolution.scheduler
    if noise is None or scheduler is None:
        return images
    level = augmentation_level(scheduler, noise_level(parts, request))
    return level.alpha * images + level.sigma * noise


def blur(images: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of images [R, C, H, W], sigma in their pixels; 0 gives them back.

    The kernel exp(-d^2 / 2 sigma^2) is sampled at whole pixels up to 4 sigma and sums to 1. Edges are mirrored, pixel
    and all, so that the mean stays and cos(pi m (i + 1/2) / W) is only scaled: by exp(-sigma^2 k^2 / 2), k = pi m / W,
    as far as so few pixels can tell.
    """
    radius = math.ceil(4 * sigma)
    if radius == 0:
        return images
    weights = torch.exp(-((torch.arange(-radius, radius + 1, dtype=torch.float64) / sigma) ** 2) / 2)
    taps = (weights / weights.sum()).tolist()
    for axis in (-2, -1):
        size = images.shape[axis]
        at = torch.arange(-radius, size + radius, device=images.device) % (2 * size)
        padded = images.index_select(axis, torch.where(at < size, at, 2 * size - 1 - at))
        total = torch.zeros_like(images)
        for start, weight in enumerate(taps):
            total += weight * padded.narrow(axis, start, size)
        images = total
    return images


def to_tensor(images: Sequence[np.ndarray], channels: int = 3) -> Tensor:
    """float32 [R, channels, H, W] in -1..1 of images [H, W, 3] in 0..1; their brightness for one channel."""
    rows = torch.stack([torch.from_numpy(image) for image in images])
    if channels == 1 < rows.shape[-1]:
        rows = (rows * torch.tensor(BRIGHTNESS)).sum(-1, keepdim=True)
    return rows.permute(0, 3, 1, 2).contiguous() * 2 - 1


def _enlarge(images: Tensor, width: int, height: int) -> Tensor:
    """Bilinear, pixel centres at halves (`align_corners=False`)."""
    if images.shape[-2:] == (height, width):
        return images
    return F.interpolate(images, (height, width), mode="bilinear", align_corners=False)
