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
    """The Result of a request from its final latents [n, C, h, w] and its images [n, 3, H, W] in 0..1 (None.

    Latents only).
    """
    request = settled.request
    arrays = None if images is None else to_arrays(images)
    if arrays is not None and parts.config.safety is not None:
        arrays = parts.config.safety(arrays, request.prompt or "")
    with torch.inference_mode(False):  # users may train on what they get
        return Result(
            images=None if arrays is None else _convert(arrays, request.output),
            latents=latents.to("cpu", torch.float32, copy=True).contiguous(),
            seeds=settled.seeds,
            request=request,
            settings=settled.settings,
            timings=timings,
            warnings=warnings,
            model=parts.name,
        )


def to_arrays(images: torch.Tensor) -> np.ndarray:
    """float32 [n, H, W, C] on the host from images [n, C, H, W]."""
    return images.permute(0, 2, 3, 1).float().cpu().contiguous().numpy()


def _convert(arrays: np.ndarray, output: str) -> Any:
    if output == "pt":
        return torch.from_numpy(arrays.transpose(0, 3, 1, 2).copy())
    if output == "np":
        return arrays
    return [to_pil(pixels) for pixels in to_uint8(arrays)]
