"""The part of the Python API of spandrel 0.4 that upscalers need, with one architecture of its thirty: Compact.

Compact is the network of realesr-general-x4v3 and realesr-animevideov3 (xinntao/Real-ESRGAN, SRVGGNetCompact).
"""

from __future__ import annotations

import enum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn


class UnsupportedModelError(Exception):
    """As of spandrel."""


class ModelTiling(enum.Enum):
    """As of spandrel."""

    SUPPORTED = 1
    DISCOURAGED = 2
    INTERNAL = 3


class Compact(nn.Module):
    """Convolutions with PReLU at the resolution of the input, a pixel shuffle, and the enlarged input added."""

    def __init__(self, features: int, convolutions: int, scale: int) -> None:
        super().__init__()
        self.scale = scale
        layers: list[nn.Module] = [nn.Conv2d(3, features, 3, padding=1), nn.PReLU(features)]
        for _ in range(convolutions):
            layers += [nn.Conv2d(features, features, 3, padding=1), nn.PReLU(features)]
        self.body = nn.ModuleList([*layers, nn.Conv2d(features, 3 * scale**2, 3, padding=1)])

    def forward(self, images: Tensor) -> Tensor:
        x = images
        for layer in self.body:
            x = layer(x)
        return F.pixel_shuffle(x, self.scale) + F.interpolate(images, scale_factor=self.scale, mode="nearest")


class ImageModelDescriptor:
    """As of spandrel, for a Compact."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        last = max(int(key.split(".")[1]) for key in weights)
        self.scale = int((len(weights[f"body.{last}.bias"]) / 3) ** 0.5)
        self.model = Compact(len(weights["body.0.bias"]), (last - 2) // 2, self.scale)
        self.model.load_state_dict(weights)
        self.architecture = SimpleNamespace(id="Compact", name="RealESRGAN Compact")
        self.input_channels = weights["body.0.weight"].shape[1]
        self.output_channels = 3
        self.purpose, self.tiling = "SR", ModelTiling.SUPPORTED
        self.supports_half = self.supports_bfloat16 = True

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def to(self, *args: Any) -> ImageModelDescriptor:
        self.model.to(*args)
        return self

    def eval(self) -> ImageModelDescriptor:
        self.model.eval()
        return self

    @torch.inference_mode()
    def __call__(self, image: Tensor) -> Tensor:
        return self.model(image).clamp_(0, 1)


class ModelLoader:
    """As of spandrel."""

    def __init__(self, device: str | None = None) -> None:
        self.device = device

    def load_from_file(self, path: str | Path) -> ImageModelDescriptor:
        weights = load_file(path)
        if "body.0.weight" not in weights:
            raise UnsupportedModelError
        return ImageModelDescriptor(weights)


def module() -> ModuleType:
    """A stand-in for the package."""
    made = ModuleType("spandrel")
    made.__dict__.update(ModelLoader=ModelLoader, UnsupportedModelError=UnsupportedModelError)
    return made
