"""The pictures of a request: read and checked when it is submitted, encoded once when its rows start.

Image to image, inpainting and enlarging are inputs of rows: latents to start from, a mask with the known image that
`sampler_step` puts back, channels beside the latents. Random numbers are drawn in the order of diffusers' pipelines, so
that a seed gives what a generator of that seed gives there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .components import Components
from .conditioning.images import load_image, load_mask, resize
from .errors import NumericsError, RequestError
from .low_resolution import check_augmentation, check_enlarges, enlarged, enlarged_size, is_noised, noised, to_tensor
from .models.vae import Gaussian, to_model
from .models.vae_tiling import TILE, in_tiles, tiled_encode
from .request import Request
from .samples import blank_fields, read_given
from .sampling.update import Plan

if TYPE_CHECKING:
    from .settling import Settled

MEGAPIXEL = 1024 * 1024
"""Pixels encoded together: below it, one picture does not fill a large GPU."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Pictures:
    """What a request gives as pictures, on the host: as they came, or (`fit`) in the size of the request.

    images: float32 [H, W, 3] in 0..1, one for all rows or one each; mask: float32 [H, W], 1 where the image is painted
    anew; changes: float32 [H, W], a strength for every pixel. encoded: what the VAE made of them. values: [1 or n, 1,
    h, w] in place of images, for a network of the user's. enlarged: [n, C, h, w], what an upscaler is given of them,
    noise included, where it is not to be made from them: for tiles.
    """

    images: tuple[np.ndarray, ...] = ()
    mask: np.ndarray | None = None
    changes: np.ndarray | None = None
    values: Tensor | None = None
    encoded: dict[str, Gaussian] = field(default_factory=dict)
    enlarged: Tensor | None = None

    @property
    def size(self) -> tuple[int, int] | None:
        """(width, height) of the first image."""
        return (self.images[0].shape[1], self.images[0].shape[0]) if self.images else None

    def fit(self, width: int, height: int) -> Pictures:
        """All of them in this size."""

        def sized(image: np.ndarray) -> np.ndarray:
            return image if image.shape[:2] == (height, width) else resize(image, width, height)

        mask, changes = (None if one is None else sized(one) for one in (self.mask, self.changes))
        return replace(self, images=tuple(map(sized, self.images)), mask=mask, changes=changes)


class Begun(NamedTuple):
    """What rows begin with: fields of `Arrivals`, on the engine's device."""

    x: Tensor
    mask: Tensor | None
    known: Tensor | None
    concat: Tensor | None


def read_pictures(parts: Components, request: Request) -> Pictures:
    """Load and check the pictures of a request. Raises RequestError for what they cannot be, for combinations that mean
    nothing, and where this model needs others.
    """
    _check_fields(parts, request)
    _check_model(parts, request)
    if parts.user is not None:
        known = read_given(parts.user, request)
        mask, changes = (None if one is None else one.numpy() for one in (known.mask, known.changes))
        return Pictures(mask=mask, changes=changes, values=known.values)
    given = list(request.image) if isinstance(request.image, (list, tuple)) else [request.image]
    if request.image is not None and len(given) not in (1, request.n):
        raise RequestError(f"image: got {len(given)} images for n={request.n}; give one, or one for every image")
    names = ["image"] if len(given) == 1 else [f"image[{i}]" for i in range(len(given))]
    return Pictures(
        images=() if request.image is None else tuple(map(load_image, given, names)),
        mask=None if request.mask is None else load_mask(request.mask),
        changes=None if request.change_map is None else load_mask(request.change_map, "change_map"),
    )


def _check_fields(parts: Components, request: Request) -> None:
    """Which fields go together, whatever the model."""
    if request.image is None:
        for name in ("mask", "change_map", "strength", "noise_level", "blur"):
            if getattr(request, name) is not None:
                raise RequestError(f"{name}: got one without an image; give image=, too, or leave {name} out")
        if request.denoising_start is not None and request.latents is None:
            raise RequestError("denoising_start: give the latents that another model left (or an image) with it")
    pairs = [("mask", "change_map"), ("strength", "change_map"), ("resample", "change_map"),
             ("strength", "denoising_start"), ("change_map", "denoising_start")]  # fmt: skip
    for one, other in pairs:
        if getattr(request, one) is not None and getattr(request, other) is not None:
            raise RequestError(f"got both {one} and {other}; give one of them")
    if request.resample is not None:
        if request.mask is None:
            raise RequestError("resample: needs an image and a mask to fill in; leave it out")
        if not isinstance(request.resample, (tuple, list)) or len(request.resample) != 2:
            raise RequestError(f"resample: got {request.resample!r}, expected (jump length, times), e.g. (10, 10)")
    if request.image is not None and request.denoising_start is not None and request.latents is not None:
        raise RequestError("got image, latents and denoising_start; start from one of image and latents")


def _check_model(parts: Components, request: Request) -> None:
    """What this model needs, and what it does not take."""
    beside, name = parts.family.beside, parts.name
    lacking = {
        "masked_image": request.image is None or request.mask is None,
        "low_resolution": request.image is None,
        "nothing": parts.family.starts and request.image is None and request.denoising_start is None,
    }
    if lacking[beside]:
        raise RequestError(f"{name}: needs {parts.family.needs}")
    if beside == "masked_image":
        for field_name in ("change_map", "resample"):
            if getattr(request, field_name) is not None:
                raise RequestError(f"{field_name}: {name} is an inpainting model, which sees the mask; leave it out")
    if parts.family.enlarges:
        for field_name in ("mask", "change_map", "strength", "resample", "denoising_start"):
            if getattr(request, field_name) is not None:
                raise RequestError(f"{field_name}: {name} enlarges images; leave it out")
        check_augmentation(parts, request)
        return
    for field_name in ("noise_level", "blur"):
        if getattr(request, field_name) is not None:
            raise RequestError(f"{field_name}: {name} is no upscaler; leave it out")


def blank_pictures(parts: Components, width: int | None, height: int | None) -> dict[str, Any]:
    """Fields of a request for this model where the picture does not matter: to warm up."""
    if parts.user is not None:
        return blank_fields(parts.user)
    family, sample = parts.family, parts.denoiser.config.sample_size or (64, 64)
    if not family.needs:
        return {}
    scale = 1 if family.enlarges else parts.scale
    high, wide = (own * scale if side is None else side * scale // parts.scale
                  for own, side in zip(sample, (height, width), strict=True))  # fmt: skip
    image = np.zeros((high, wide, 3), np.float32)
    more = {"masked_image": {"mask": np.ones((high, wide), np.float32)}, "nothing": {"strength": 1.0}}
    return {"image": image, **more.get(family.beside, {})}


def natural_size(parts: Components, pictures: Pictures) -> tuple[tuple[int, int] | None, tuple[str, ...]]:
    """The (width, height) of the result where the request says nothing, and a warning if that is not the picture's."""
    if pictures.size is None:
        return None, ()
    if parts.family.enlarges:
        width, height = enlarged_size(parts, *pictures.size)
        shapes = "from {} x {} to {} x {} pixels".format(*pictures.size, width, height)
        stretched = width * pictures.size[1] != height * pictures.size[0]
        return (width, height), (f"image: stretched {shapes}; give another width or height",) if stretched else ()
    size = tuple(max(parts.scale, side - side % parts.scale) for side in pictures.size)
    if size == pictures.size:
        return pictures.size, ()
    shapes = " to ".join("{} x {}".format(*one) for one in (pictures.size, size))
    return (size[0], size[1]), (f"image: resized from {shapes} pixels, multiples of {parts.scale}",)


def fit(parts: Components, pictures: Pictures, width: int, height: int) -> Pictures:
    """The pictures for an image of this size: an image to enlarge has one pixel per latent site, and stays as it is
    where it is enlarged in pixels. Raises RequestError for one that is larger than the result.
    """
    small = parts.family.enlarges
    if small and parts.vae is None:
        for image in pictures.images:
            check_enlarges(parts, (image.shape[1], image.shape[0]), width, height)
        return pictures
    return pictures.fit(*(side // parts.scale if small else side for side in (width, height)))


def portion(parts: Components, request: Request, pictures: Pictures) -> dict[str, Any]:
    """The part of the schedule to run, as arguments of `make_plan`.

    A mask without a strength starts from pure noise, as diffusers' inpainting at strength 1; a change map starts where
    its largest strength does.
    """
    strength = request.strength
    if pictures.changes is not None:
        strength = round(float(pictures.changes.max()), 6)
        if strength == 0:
            raise RequestError("change_map: 0 everywhere, so that nothing would change; give it brighter pixels")
    elif request.mask is not None:
        strength = None if strength == 1 else strength
    elif request.image is not None and parts.family.beside == "nothing" and request.denoising_start is None:
        strength = parts.family.strength if strength is None else strength
    return {
        "strength": strength,
        "denoising_start": request.denoising_start,
        "denoising_end": request.denoising_end,
    }


def edited(parts: Components, request: Request, plan: Plan) -> Plan:
    """The plan with the known image put back, where the request has a mask and the model does not see it itself."""
    if request.change_map is not None:
        return plan.inpainting(strengths=True)
    if request.mask is None or parts.family.beside == "masked_image":
        return plan
    return plan.inpainting() if request.resample is None else plan.repaint(*request.resample)


def begin(parts: Components, settled: Settled, images: Sequence[int]) -> Begun:
    """State, mask, known image and more channels of the rows of the request's images at `images`.

    Raises NumericsError where the VAE gives NaN or Inf.
    """
    plan, pictures, device = settled.plan, settled.pictures, parts.config.device
    dtype = torch.float64 if parts.config.dtype == torch.float64 else torch.float32
    draws = [_draw(parts, settled, index) for index in images]

    def drawn(name: str) -> Tensor:
        return torch.cat([getattr(one, name) for one in draws]).to(device, dtype)

    noise, latents = drawn("noise"), None
    if draws[0].image is not None:
        latents = _latents(parts, pictures, images, drawn("image"))
    elif pictures.values is not None:
        latents = _rows(pictures.values, images).to(device, dtype)
    elif pictures.images and parts.vae is None and not parts.family.enlarges:
        latents = _rows(to_tensor(pictures.images, parts.channels), images).to(device, dtype)
    elif settled.request.denoising_start is not None:
        assert settled.request.latents is not None
        latents = settled.request.latents[list(images)].to(device, dtype).reshape(noise.shape)
    x = plan.init_scale * noise
    if latents is not None:
        x = x + plan.init_alpha * latents
    mask = known = concat = None
    if _puts_back(parts, settled.request):
        assert latents is not None
        mask = _latent_mask(parts, pictures).to(device, dtype).expand(len(images), -1, -1, -1)
        known = torch.stack([latents, noise], 1)
    if parts.family.beside == "masked_image":
        masked = _latents(parts, pictures, images, drawn("beside"), masked=True)
        concat = torch.cat([_latent_mask(parts, pictures).to(masked).expand(len(images), -1, -1, -1), masked], 1)
    elif pictures.enlarged is not None:
        concat = pictures.enlarged[list(images)].to(x)
    elif parts.family.enlarges:
        noise_beside = drawn("beside") if is_noised(parts) else None
        concat = noised(parts, settled.request, _low_resolution(parts, settled, images).to(x), noise_beside)
    return Begun(x, mask, known, None if concat is None else concat.repeat_interleave(settled.branches, 0))


def for_tiles(parts: Components, whole: Settled, images: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """What `begin` would give an upscaler of whole images [h, w, 3] beside the latents, and the latents' noise.

    Both [n, C, h, w], the noise on the host: to cut tiles from, which then see the same noise where they overlap.
    """
    draws = [_draw(parts, whole, index) for index in range(len(whole.seeds))]
    low = enlarged(parts, whole.request, images, whole.width, whole.height)
    beside = torch.cat([draw.beside for draw in draws if draw.beside is not None]).to(low) if is_noised(parts) else None
    return noised(parts, whole.request, low, beside), torch.cat([draw.noise for draw in draws])


def _low_resolution(parts: Components, settled: Settled, images: Sequence[int]) -> Tensor:
    """What an upscaler's rows are given beside the latents, before noise [len(images), C, h, w]."""
    given = settled.pictures.images
    chosen = given if len(given) == 1 else [given[index] for index in images]
    made = enlarged(parts, settled.request, chosen, settled.width, settled.height)
    return made.expand(len(images), -1, -1, -1)


class _Draw(NamedTuple):
    """Normal numbers of one row [1, *]: for sampling its latents, its noise, and for what is beside the latents."""

    image: Tensor | None
    noise: Tensor
    beside: Tensor | None


def _draw(parts: Components, settled: Settled, index: int) -> _Draw:
    """In the order of diffusers' pipelines: image latents, noise, masked image; of an upscaler: its image, noise."""
    generator = torch.Generator("cpu").manual_seed(settled.seeds[index])
    request, beside = settled.request, parts.family.beside
    shape = (1, parts.channels, settled.height // parts.scale, settled.width // parts.scale)

    def draw(channels: int) -> Tensor:
        return torch.randn((1, channels, *shape[2:]), generator=generator)

    needed = beside == "nothing" or (beside == "masked_image" and settled.plan.init_alpha != 0)
    encoded = bool(settled.pictures.images) and parts.vae is not None and needed
    image = draw(shape[1]) if encoded else None
    low = draw(3 if parts.vae is not None else shape[1]) if is_noised(parts) else None
    if request.latents is None:
        noise = draw(shape[1])
    else:
        noise = (
            request.latents[index].detach().cpu().reshape(shape)
            if request.denoising_start is None
            else torch.zeros(shape)
        )
    return _Draw(image, noise, draw(shape[1]) if beside == "masked_image" else low)


def _puts_back(parts: Components, request: Request) -> bool:
    return parts.family.beside == "nothing" and (request.mask is not None or request.change_map is not None)


def _latent_mask(parts: Components, pictures: Pictures) -> Tensor:
    """float32 [1, 1, h, w]: 0 or 1 from the upper left pixel of every latent site, as in diffusers; of a change map the
    mean strength.
    """
    if pictures.changes is not None:
        strengths = torch.from_numpy(pictures.changes).double()[None, None]
        # A whole number of millionths: a constant map must stay what `strength` says after averaging and conversion
        return F.avg_pool2d(strengths, parts.scale).mul(1e6).round().div(1e6)
    return _binary(pictures)[:, :, :: parts.scale, :: parts.scale]


def _binary(pictures: Pictures) -> Tensor:
    assert pictures.mask is not None
    return (torch.from_numpy(pictures.mask)[None, None] >= 0.5).float()


def _latents(
    parts: Components, pictures: Pictures, images: Sequence[int], noise: Tensor, masked: bool = False
) -> Tensor:
    """Latents [len(images), C, h, w] of the pictures, sampled with noise; masked: without what is painted anew."""
    name = "masked" if masked else "image"
    if name not in pictures.encoded:
        pixels = to_tensor(pictures.images)
        pictures.encoded[name] = _encode(parts, pixels * (_binary(pictures) < 0.5) if masked else pixels, noise.dtype)
    moments = pictures.encoded[name]
    chosen = Gaussian(_rows(moments.mean, images), _rows(moments.logvar, images))
    assert parts.vae is not None
    return to_model(chosen.sample(noise), parts.vae.config)


def _encode(parts: Components, images: Tensor, dtype: torch.dtype) -> Gaussian:
    """The moments of images [R, 3, H, W] in -1..1, in the VAE's own scale; of large ones in tiles."""
    vae, config, (height, width) = parts.vae, parts.config, images.shape[-2:]
    assert vae is not None
    pixels = images.to(config.device, config.vae_dtype)
    tiles, side = in_tiles(config.vae_tiling, height, width), TILE * parts.scale
    together = 1 if config.deterministic or tiles else max(1, MEGAPIXEL // (height * width))
    one = pixels[:1, :, :side, :side] if tiles else pixels[:together]
    parts.binders["vae"].bind(("encode", *one.shape[1:]), partial(vae.encode, one))
    made = [
        tiled_encode(vae.encode, part, parts.scale) if tiles else vae.encode(part)
        for part in map(torch.clone, pixels.split(together))
    ]
    moments = [torch.cat([getattr(part, name) for part in made]).to(dtype) for name in ("mean", "logvar")]
    if not torch.isfinite(moments[0]).all():
        raise NumericsError(f"the VAE encoded NaN or Inf in {parts.config.vae_dtype}; load with vae_dtype='float32'")
    return Gaussian(*moments)


def _rows(tensor: Tensor, images: Sequence[int]) -> Tensor:
    """The rows of these images, of a tensor that has one for each or one for all."""
    return tensor.expand(len(images), -1, -1, -1) if len(tensor) == 1 else tensor[list(images)]
