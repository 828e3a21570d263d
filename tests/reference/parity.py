"""Load our networks from reference folders, and the one gate they have to pass."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from stepfuse.engine.models.controlnet import ControlNet, ControlNetConfig
from stepfuse.engine.models.unet import UNet
from stepfuse.engine.models.unet_config import UNetConfig
from stepfuse.engine.models.vae import AutoencoderKL, VAEConfig, VQModel
from stepfuse.engine.weights.checkpoint import Checkpoint
from stepfuse.engine.weights.load import load_weights
from stepfuse.engine.weights.maps import MAPS

GATE = 2e-7  # of the largest value, in float64; float32 would hide a wrong epsilon


def ours(folder: Path, component: str = "", dtype: torch.dtype = torch.float64) -> nn.Module:
    """Our module for a component of a diffusers folder, with its weights."""
    checkpoint = Checkpoint.open(folder)
    config, cls = checkpoint.config(component), checkpoint.components[component]
    with torch.device("meta"):
        if cls in ("UNet2DConditionModel", "UNet2DModel"):
            module = UNet(UNetConfig.from_diffusers(config))
        elif cls == "ControlNetModel":
            module = ControlNet(ControlNetConfig.from_diffusers(config))
        else:
            module = (VQModel if cls == "VQModel" else AutoencoderKL)(VAEConfig.from_diffusers(config))
    load_weights(module, checkpoint.weights(component), MAPS[cls], device="cpu", dtype=dtype, what=cls)
    return module


def error(got: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest value."""
    assert got.shape == expected.shape, f"{got.shape} is not {expected.shape}"
    return float((got - expected).abs().max() / expected.abs().max())
