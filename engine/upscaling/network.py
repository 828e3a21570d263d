"""Feed-forward networks (Real-ESRGAN, SwinIR and others) through `spandrel`, which knows their architectures."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, RequestError
from ..weights.files import PICKLES

INSTALL = "pip install 'stepfuse[upscale]'"
SUPPORT = {torch.float16: "supports_half", torch.bfloat16: "supports_bfloat16"}
"""What a network's description says about a dtype; all run in float32."""


@dataclass(frozen=True, eq=False)
class Network:
    """A network with its weights. descriptor: a `spandrel.ImageModelDescriptor` that runs in `dtype`."""

    name: str
    descriptor: Any
    dtype: torch.dtype

    @property
    def scale(self) -> float:
        """Sides of the result over sides of the images; 1 for one that only restores."""
        return self.descriptor.scale

    @property
    def wholes(self) -> bool:
        """Whether it must see an image whole; it divides it itself where that is too large."""
        return self.descriptor.tiling.name == "INTERNAL"

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """float32 [n, 3, scale * H, scale * W] in 0..1 from images [n, 3, H, W], or [n, 1, H, W] taken as grey."""
        colors = images.to(self.descriptor.device, self.dtype).expand(-1, 3, -1, -1).contiguous()
        # only networks for super-resolution are plain functions of batches; spandrel promises no more than one image
        together = len(colors) if self.descriptor.purpose == "SR" else 1
        return torch.cat([self.descriptor(part).float() for part in colors.split(together)]).to(images.device)


def load_upscaler(path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Network:
    """Read a `.safetensors` file of any image network that spandrel knows; nothing pickled is ever opened.

    dtype: None for float16, else bfloat16, on CUDA where the network allows it, and float32 otherwise. Raises
    RequestError where spandrel is missing or the network cannot run in `dtype`, CheckpointError for a file that is
    missing, damaged, pickled, of an unknown architecture, or not of a network from three channels to three.
    """
    path = Path(path)
    _check_file(path)
    found = _read(_spandrel(), path)
    if not hasattr(found, "purpose") or found.purpose == "Inpainting":
        raise CheckpointError(f"{path}: {found.architecture.name} fills in masks; expected a network that enlarges")
    if (found.input_channels, found.output_channels) != (3, 3):
        raise CheckpointError(
            f"{path}: {found.architecture.name} goes from {found.input_channels} channels to {found.output_channels}, "
            "expected 3 to 3"
        )
    if dtype is None:
        halves = [half for half, said in SUPPORT.items() if getattr(found, said)]
        dtype = halves[0] if halves and torch.device(device).type == "cuda" else torch.float32
    elif not getattr(found, SUPPORT.get(dtype, "model"), False):
        raise RequestError(f"dtype: {found.architecture.name} cannot run in {dtype}; use float32")
    found.to(torch.device(device), dtype).eval()
    return Network(path.stem, found, dtype)


def _check_file(path: Path) -> None:
    if path.suffix.lower() in PICKLES:
        raise CheckpointError(
            f"{path} is pickled, which can run code when opened: get the .safetensors file, or convert it where you "
            "trust it: safetensors.torch.save_file(weights, path)"
        )
    if path.suffix.lower() != ".safetensors":
        raise CheckpointError(f"{path}: expected a .safetensors file of an upscaler")
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")


def _spandrel() -> Any:
    try:
        return importlib.import_module("spandrel")
    except ImportError as error:
        raise RequestError(
            f"upscalers from files need the package spandrel ({error}): {INSTALL}; 'lanczos' works without it"
        ) from error
    except RuntimeError as error:  # torchvision, which spandrel imports, was built for another torch
        raise RequestError(f"spandrel does not load: {error}; install the torchvision of your torch") from error


def _read(spandrel: Any, path: Path) -> Any:
    from safetensors import SafetensorError

    try:
        return spandrel.ModelLoader(device="cpu").load_from_file(path)
    except spandrel.UnsupportedModelError as error:
        raise CheckpointError(f"{path}: no architecture that spandrel knows has these weights") from error
    except SafetensorError as error:
        raise CheckpointError(f"{path}: damaged, or no safetensors file: {error}") from error
    except (RuntimeError, KeyError, ValueError, AssertionError) as error:
        raise CheckpointError(f"{path}: the weights do not fit their architecture: {error}") from error
