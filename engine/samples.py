"""What requests to a network of the user's bring (shapes, known values, conditioning), and what they get: samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import RequestError
from .models.unet import Conditioning
from .request import Request
from .runtimes.user_network import UserNetwork, folded

IMAGES_ONLY = ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2", "prompt_embeds", "negative_prompt_embeds",
               "pooled_prompt_embeds", "negative_pooled_prompt_embeds", "clip_skip", "class_labels", "width", "height",
               "noise_level", "blur", "upscale")  # fmt: skip
USER_ONLY = ("shape", "conditioning", "negative_conditioning")


@dataclass(frozen=True)
class Given:
    """The known values of a request as latents on the host, in the module's shape folded to one channel.

    values: [1 or n, 1, h, w] to start from or to keep. mask: [h, w], 1 where it is new; changes: [h, w], strengths.
    """

    values: Tensor | None = None
    mask: Tensor | None = None
    changes: Tensor | None = None


def refuse_user_fields(name: str, request: Request) -> None:
    """Raise RequestError for fields that only a network of the user's takes. name: of the model."""
    for field in USER_ONLY:
        if getattr(request, field) is not None:
            raise RequestError(f"{field}: {name} is no network of Engine.from_module; leave it out")


def check_user_request(net: UserNetwork, name: str, request: Request) -> None:
    """Raise RequestError for fields that mean nothing here, and for conditioning that is missing or not taken."""
    for field in IMAGES_ONLY:
        if getattr(request, field) is not None:
            raise RequestError(f"{field}: {name} is a network of its own, without text or pixels; leave it out")
    if request.controls:
        raise RequestError(f"controls: {name} is a network of its own; leave them out")
    if request.loras:
        raise RequestError(f"loras: {name} is a network of its own; leave them out")
    if request.output == "pil":
        raise RequestError(f"output: got 'pil', but {name} makes samples, not pictures; use 'pt', 'np' or 'latent'")
    for field in ("conditioning", "negative_conditioning"):
        _check_conditioning(net, name, request, field)


def require_negative(name: str, request: Request) -> None:
    """Raise RequestError where guidance has nothing to guide away from."""
    if request.negative_conditioning is None:
        raise RequestError(
            f"negative_conditioning: {name} with guidance_scale {request.guidance_scale} needs what to guide away from"
        )


def sample_shape(net: UserNetwork, request: Request) -> tuple[int, ...]:
    """The shape of the request's samples: as its tensors have it, as it says, or the network's own.

    Raises RequestError where these differ, and for a shape that the network does not take.
    """
    found: dict[str, tuple[int, ...]] = {}
    if request.shape is not None:
        found["shape"] = tuple(request.shape)
    for field in ("latents", "image"):
        if getattr(request, field) is not None:
            rows = _tensor(field, getattr(request, field))
            found[field] = tuple(rows.shape[1:])
            allowed = (request.n,) if field == "latents" else (1, request.n)
            if rows.dim() == 0 or len(rows) not in allowed or not net.pattern.fits(found[field]):
                lead = " or ".join(map(str, dict.fromkeys(allowed)))
                raise RequestError(f"{field}: got shape {tuple(rows.shape)}, expected {lead} rows of {net.pattern}")
    if not found and net.pattern.fixed is None:
        raise RequestError(f"shape: the network takes {net.pattern}; give shape=, or latents of that shape")
    shapes = list(found.values()) or [net.pattern.fixed or ()]
    if len(set(shapes)) > 1:
        raise RequestError(
            "; ".join(f"{field}: rows of {shape}" for field, shape in found.items()) + "; give one shape"
        )
    whole = all(isinstance(axis, int) and axis >= 1 for axis in shapes[0])
    if not whole or not net.pattern.fits(shapes[0]):
        raise RequestError(f"shape: got {shapes[0]}, expected {net.pattern}, whole numbers >= 1")
    return shapes[0]


def read_given(net: UserNetwork, request: Request) -> Given:
    """The known values, and a mask or strengths that broadcast to one row. Raises RequestError for other shapes."""
    if request.image is None:
        return Given()
    values = _tensor("image", request.image)
    if not torch.isfinite(values).all():
        raise RequestError("image: got NaN or Inf; give finite values, and a mask where they are not known")

    def sites(field: str) -> Tensor | None:
        if getattr(request, field) is None:
            return None
        mask = _tensor(field, getattr(request, field)).to(torch.float64)
        try:
            mask = mask.expand(values.shape[1:])
        except RuntimeError:
            raise RequestError(
                f"{field}: got shape {tuple(mask.shape)}, expected one that broadcasts to {tuple(values.shape[1:])}"
            ) from None
        if not ((mask >= 0) & (mask <= 1)).all():
            raise RequestError(f"{field}: expected numbers from 0 to 1")
        return mask.reshape(folded(mask.shape))

    return Given(net.pattern.fold(values), sites("mask"), sites("change_map"))


def condition_user(request: Request, images: int, branches: int, device: torch.device) -> Conditioning:
    """The model rows (image 0 given, image 0 negative, image 1 ...)."""
    fields = ("conditioning", "negative_conditioning")[:branches]
    given = [_tensor(field, value) for field in fields if (value := getattr(request, field)) is not None]
    if not given:
        return Conditioning()
    rows = torch.stack([one.expand(images, *one.shape[1:]) for one in given], 1).flatten(0, 1).to(device)
    return Conditioning(hidden=rows if rows.dim() > 1 else rows[:, None])


def _check_conditioning(net: UserNetwork, name: str, request: Request, field: str) -> None:
    value, pattern = getattr(request, field), net.conditioning
    if pattern is None:
        if value is not None:
            raise RequestError(f"{field}: {name} was given to from_module without conditioning=; leave it out")
        return
    if value is None:
        if field == "conditioning":
            raise RequestError(f"conditioning: {name} needs a tensor [1 or n, *{pattern}]")
        return
    rows, other = _tensor(field, value), request.conditioning
    if rows.dim() == 0 or len(rows) not in (1, request.n) or not pattern.fits(rows.shape[1:]):
        lead = "1" if request.n == 1 else f"1 or {request.n}"
        raise RequestError(f"{field}: got shape {tuple(rows.shape)}, expected {lead} rows of {pattern}")
    if other is not None and (rows.shape[1:] != other.shape[1:] or rows.dtype != other.dtype):
        raise RequestError(
            f"{field}: got {rows.dtype} rows of {tuple(rows.shape[1:])}, expected {other.dtype} rows of "
            f"{tuple(other.shape[1:])}, as of conditioning"
        )


def _tensor(field: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise RequestError(f"{field}: got {type(value).__name__}, expected a tensor")
    return value.detach()


def blank_fields(net: UserNetwork) -> dict[str, Any]:
    """Fields of a request whose values do not matter: to warm up. Zeros, for every axis that is open 1."""

    def closed(axes: Sequence[int | None]) -> tuple[int, ...]:
        return tuple(axis or 1 for axis in axes)

    fields: dict[str, Any] = {"shape": closed(net.pattern.axes)}
    if net.conditioning is not None:
        fields["conditioning"] = torch.zeros(1, *closed(net.conditioning.axes), dtype=net.dtype)
    return fields
