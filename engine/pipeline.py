"""A request, phase by phase, as functions over Components.

Settle -> encode -> start -> (the running batch) -> decode.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from .batch import Arrivals
from .components import Components
from .controls import prepare_controls
from .determinism import with_fixed_algorithms
from .errors import NumericsError
from .imaging import begin
from .models.controlled import Controlled, ControlledPrepared
from .models.unet import Conditioning, Prepared
from .models.vae import from_model
from .models.vae_tiling import TILE, in_tiles, tiled
from .prompting import condition
from .settling import Settled
from .upscaling.upscaler import Upscaler

MEGAPIXEL = 1024 * 1024
"""decode_rows of 0 decodes this many pixels together: below it, one image does not fill a large GPU."""


@with_fixed_algorithms
def encode(parts: Components, batch: Sequence[Settled]) -> list[tuple[Conditioning, tuple[str, ...]]]:
    """What the model rows (image 0 cond, image 0 uncond, image 1 ...) of each request are conditioned on, and warnings.

    The prompts of all requests are encoded together; in deterministic mode one by one.
    """
    return condition(parts, batch)


@with_fixed_algorithms
def start(parts: Components, settled: Settled, conditioning: Conditioning, images: Sequence[int]) -> Arrivals:
    """The rows of the request's images at `images` before their first update, on the engine's device."""
    plan, begun = settled.plan, begin(parts, settled, images)
    dynamic = plan.dynamic_threshold
    return Arrivals(
        **begun._asdict(),
        c_in=plan.updates[0].c_in,
        table=torch.from_numpy(plan.table()).to(begun.x),
        weights=[settled.guidance_scale, 1 - settled.guidance_scale] if settled.branches == 2 else [1.0],
        rescale=settled.request.guidance_rescale,
        seeds=[settled.seeds[index] for index in images],
        draws=2 if plan.stochastic else 0,
        channels=parts.denoiser.config.out_channels,
        prepared=prepare(parts, settled, conditioning, images),
        threshold=None if dynamic is None else (dynamic.percentile, dynamic.most),
    )


@with_fixed_algorithms
def prepare(
    parts: Components, settled: Settled, conditioning: Conditioning, images: Sequence[int]
) -> Prepared | ControlledPrepared:
    """The model rows of the request's images at `images`: what all their updates share.

    In deterministic mode the images are prepared one by one.
    """
    with parts.loras.of(settled.loras):
        prepared = _prepare(parts, settled, conditioning, images)
    return parts.loras.marked(prepared, settled.loras)


def _prepare(
    parts: Components, settled: Settled, conditioning: Conditioning, images: Sequence[int]
) -> Prepared | ControlledPrepared:
    if parts.config.deterministic and len(images) > 1:
        each: list[Any] = [_prepare(parts, settled, conditioning, [index]) for index in images]
        return type(each[0]).cat(each)
    timesteps = parts.times(settled.plan)
    rows = [index * settled.branches + branch for index in images for branch in range(settled.branches)]
    chosen, timesteps = _select(conditioning, rows), timesteps.expand(len(rows), *timesteps.shape)
    network = parts.network(settled.control_names)
    if isinstance(network, Controlled):
        return prepare_controls(network, settled.controls, chosen, timesteps, settled.branches)
    return network.prepare(chosen, timesteps)


@with_fixed_algorithms
def decode(parts: Components, latents: torch.Tensor) -> torch.Tensor:
    """Images float32 [n, 3, H, W] in 0..1 on the engine's device from final latents [n, C, h, w]; of a network of the
    user's its samples [n, *shape].

    Decodes as many images together as configured, or in overlapping tiles. Raises NumericsError instead of returning
    NaN.
    """
    if parts.user is not None:
        return parts.user.pattern.unfold(latents)
    if parts.vae is None:
        images = latents.float()
    else:
        height, width = (side * parts.scale for side in latents.shape[-2:])
        scaled = from_model(latents, parts.vae.config).to(parts.config.vae_dtype)
        tiles = in_tiles(parts.config.vae_tiling, height, width)
        chunk = parts.config.decode_rows or max(1, MEGAPIXEL // (height * width))
        one = scaled[:1, :, :TILE, :TILE] if tiles else scaled[:chunk]
        parts.binders["vae"].bind(tuple(one.shape[1:]), partial(parts.vae.decode, one))
        decoded = [
            tiled(parts.vae.decode, part, TILE) if tiles else parts.vae.decode(part)
            for part in map(torch.clone, scaled.split(1 if tiles else chunk))  # alignment, too, can change the bits
        ]
        images = torch.cat(decoded).float()
    if not torch.isfinite(images).all():
        raise NumericsError(f"the VAE produced NaN or Inf in {parts.config.vae_dtype}; load with vae_dtype='float32'")
    return (images / 2 + 0.5).clamp(0, 1)


@with_fixed_algorithms
def enlarge(parts: Components, upscaler: Upscaler, images: torch.Tensor) -> torch.Tensor:
    """Images float32 [n, C, scale * H, scale * W] in 0..1 from decoded ones [n, C, H, W], one after the other.

    C is 3 where a network enlarges. Raises NumericsError instead of returning NaN.
    """
    made = torch.cat([upscaler(image) for image in images.split(1)])
    if not torch.isfinite(made).all():
        raise NumericsError("upscale: the upscaler produced NaN or Inf; add it with dtype=torch.float32")
    return made


def decode_each(
    parts: Components, latents: Sequence[torch.Tensor], wanted: Sequence[bool]
) -> list[torch.Tensor | None]:
    """The images of several requests of one size, decoded together; None for a request that wants latents only."""
    chosen = [own for own, asked in zip(latents, wanted, strict=True) if asked]
    if not chosen:
        return [None] * len(latents)
    images = iter(decode(parts, torch.cat(chosen)).split([len(own) for own in chosen]))
    return [next(images) if asked else None for asked in wanted]


def _select(conditioning: Conditioning, rows: list[int]) -> Conditioning:
    given = {name: value for name, value in vars(conditioning).items() if value is not None}
    return Conditioning(**{name: value[rows] for name, value in given.items()})
