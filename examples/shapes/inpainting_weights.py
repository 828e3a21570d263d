"""What makes an inpainting model of `shapes`: a new entry of the U-Net and a LoRA, in one small file beside this one.

The entry takes the latents, a mask and the latents of what the mask leaves (Rombach et al. 2022): 9 channels where
latents have 4, here 17. Every other layer W becomes W + B A of rank 8 (Hu et al. 2022).
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from stepfuse.engine.families import builtin_folder

from .latents import CHANNELS

SHAPES = builtin_folder("shapes")
DIFFERENCE = Path(__file__).with_name("inpainting.safetensors")
FILE_LIMIT = 2**20
RANK = 8
IN_CHANNELS = 2 * CHANNELS + 1
ENTRY = ("conv_in.weight", "conv_in.bias")
WEIGHTS = "diffusion_pytorch_model.safetensors"


class LowRank(nn.Module):
    """A layer's weight W [O, I, ...] plus B A; B [O, r, 1, ...] begins as zeros, A [r, I, ...] as Kaiming's numbers."""

    def __init__(self, weight: Tensor, rank: int = RANK) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(weight.new_empty(rank, *weight.shape[1:]))
        self.lora_B = nn.Parameter(weight.new_zeros(len(weight), rank, *(1 for _ in weight.shape[2:])))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + product(self.lora_A, self.lora_B)


def product(a: Tensor, b: Tensor) -> Tensor:
    """B A in the shape of the layer's weight: a convolution with A's kernel to r channels, then one of 1x1."""
    return (b.flatten(1) @ a.flatten(1)).view(len(b), *a.shape[1:])


def widen(entry: nn.Conv2d) -> nn.Conv2d:
    """The entry of the U-Net for more channels, which begin as zeros: nothing changes."""
    wide = nn.Conv2d(IN_CHANNELS, entry.out_channels, 3, padding=1)
    with torch.no_grad():
        wide.weight.zero_()[:, : entry.in_channels] = entry.weight
        wide.bias.copy_(entry.bias)  # type: ignore[union-attr]
    return wide


def open_unet(unet: nn.Module) -> dict[str, nn.Parameter]:
    """Freeze the U-Net, and give it a wide entry and low-rank additions; what is trained, by its name in the file."""
    unet.requires_grad_(False)
    unet.conv_in = widen(unet.conv_in)
    trained = {name: unet.get_parameter(name) for name in ENTRY}
    for name, layer in list(unet.named_modules()):
        if isinstance(layer, nn.Linear | nn.Conv2d) and name != "conv_in":
            added = LowRank(layer.weight)
            parametrize.register_parametrization(layer, "weight", added)
            trained |= {f"{name}.{part}.weight": parameter for part, parameter in added.named_parameters()}
    return trained


def compose(base: Mapping[str, Tensor], difference: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of the inpainting U-Net from that of `shapes` and what was trained, in the dtype of `base`.

    ValueError where the two do not fit each other.
    """
    state = dict(base) | {name: difference[name].to(base[name].dtype) for name in ENTRY if name in difference}
    for name in difference:
        layer, _, part = name.removesuffix(".weight").rpartition(".")
        if name in ENTRY or part == "lora_B":
            continue
        key = f"{layer}.weight"
        if part != "lora_A" or key not in base or f"{layer}.lora_B.weight" not in difference:
            raise ValueError(f"got {name!r}; expected {' and '.join(ENTRY)}, and pairs lora_A, lora_B of its layers")
        added = product(difference[name].float(), difference[f"{layer}.lora_B.weight"].float())
        state[key] = (base[key].float() + added).to(base[key].dtype)
    return state


def save_difference(difference: Mapping[str, Tensor], path: Path = DIFFERENCE) -> int:
    """Write it in float16; returns its bytes. RuntimeError where the file outgrows its limit."""
    half = {name: tensor.detach().half().contiguous() for name, tensor in difference.items()}
    size = sum(2 * tensor.numel() for tensor in half.values())
    if size > FILE_LIMIT:
        raise RuntimeError(f"got {size} bytes, expected at most {FILE_LIMIT}; choose a smaller rank")
    save_file(half, path)
    path.chmod(0o644)
    return path.stat().st_size


def build(folder: Path, difference: Path = DIFFERENCE) -> Path:
    """Write the whole inpainting model, a diffusers folder in float16 which `Engine.load` takes; returns the folder.

    All but the U-Net is copied from the built-in `shapes`. FileExistsError where the folder is there already.
    """
    shutil.copytree(SHAPES, folder)
    state = compose(load_file(SHAPES / "unet" / WEIGHTS), load_file(difference))
    save_file(state, folder / "unet" / WEIGHTS, metadata={"format": "pt"})
    for path, changed in (
        (folder / "unet" / "config.json", {"in_channels": IN_CHANNELS}),
        (folder / "model_index.json", {"_class_name": "StableDiffusionInpaintPipeline"}),
    ):
        path.write_text(json.dumps(json.loads(path.read_text()) | changed, indent=2) + "\n")
    return folder
