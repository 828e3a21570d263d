"""Results: pixels in the form the user asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from .components import Components
from .images import to_pil, to_uint8
from .request import Result
from .settling import Settled


def make_result(
    parts: Components,
    settled: Settled,
    latents: torch.Tensor,
    images: torch.Tensor | None,
    timings: dict[str, float],
    warnings: tuple[str, ...],
) -> Result:
    """The Result of a request from its final latents [n, C, h, w] and its images [n, 3, H, W] in 0..1, or of a network
    of the user's its samples [n, *shape]; None where only latents are wanted.
    """
    request, kept = settled.request, torch.float32
    if parts.user is not None:
        latents = parts.user.pattern.unfold(latents)
        kept = latents.dtype
    arrays = None if images is None else to_arrays(images) if parts.user is None else images.cpu().numpy()
    if arrays is not None:
        arrays = checked(parts, arrays, request.prompt)
    with torch.inference_mode(False):  # users may train on what they get
        return Result(
            images=None if arrays is None else _form(parts, arrays, request.output),
            latents=latents.to("cpu", kept, copy=True).contiguous(),
            seeds=settled.seeds,
            request=request,
            settings=settled.settings,
            timings=timings,
            warnings=warnings,
            model=parts.name,
        )


def checked(parts: Components, arrays: np.ndarray, prompt: str | None) -> np.ndarray:
    """Images float32 [n, H, W, C] in 0..1 as the configuration's `safety` lets them out. Raises what it raises."""
    return arrays if parts.config.safety is None else parts.config.safety(arrays, prompt or "")


def preview_of(parts: Components, images: torch.Tensor, prompt: str | None) -> np.ndarray:
    """uint8 [n, H, W, C] of images [n, C, H, W] in 0..1, as `checked` lets them out; samples [n, *shape] of a network
    of the user's as they are.
    """
    if parts.user is not None:
        return images.cpu().numpy().copy()
    return to_uint8(checked(parts, to_arrays(images), prompt))


def _form(parts: Components, arrays: np.ndarray, output: str | None) -> Any:
    if parts.user is None:
        return convert(arrays, output)
    return torch.from_numpy(arrays.copy()) if output == "pt" else arrays.copy()


def to_arrays(images: torch.Tensor) -> np.ndarray:
    """float32 [n, H, W, C] on the host from images [n, C, H, W]."""
    return images.permute(0, 2, 3, 1).float().cpu().contiguous().numpy()


def convert(arrays: np.ndarray, output: str | None) -> Any:
    """Images float32 [n, H, W, C] in 0..1 in the form of a request's `output`."""
    if output == "pt":
        return torch.from_numpy(arrays.transpose(0, 3, 1, 2).copy())
    if output == "np":
        return arrays
    return [to_pil(pixels) for pixels in to_uint8(arrays)]
