"""Our networks with random weights of unit gain, and one update of them as a module whose op sites can be switched.

Random weights say how long an evaluation takes, not what it draws: speed of caching and quality need a trained model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.models.controlnet import ControlNet, ControlNetConfig
from ..engine.models.unet import Conditioning, Prepared, UNet
from ..engine.models.unet_config import UNetConfig
from ..engine.models.vae import AutoencoderKL, VAEConfig
from ..kernels import sampler_step
from ..kernels.dispatch import Site
from ..kernels.sampler_step.columns import HISTORY, Column

LINES = 20  # updates in the table of a request


def unet(config: Mapping[str, Any], device: torch.device | str, dtype: torch.dtype = torch.float32) -> UNet:
    """Our U-Net of a diffusers configuration."""
    with torch.device(device), _default(dtype):
        net = UNet(UNetConfig.from_diffusers(dict(config)))
    return _randomise(net)


def autoencoder(
    config: Mapping[str, Any], device: torch.device | str, dtype: torch.dtype = torch.float32
) -> AutoencoderKL:
    """Our autoencoder of a diffusers configuration."""
    with torch.device(device), _default(dtype):
        vae = AutoencoderKL(VAEConfig.from_diffusers(dict(config)))
    return _randomise(vae)


def controlnet(trunk: UNetConfig, factor: int, device: torch.device | str) -> ControlNet:
    """A ControlNet in float32 for a U-Net of this structure whose latents have `factor` pixels a site along a side."""
    widths = tuple(16 * 2**level for level in range(factor.bit_length()))
    with torch.device(device), _default(torch.float32):
        net = ControlNet(ControlNetConfig(trunk=trunk, image_widths=widths))
    return _randomise(net)


def unet_inputs(config: Mapping[str, Any], rows: int, device: torch.device | str) -> dict[str, Tensor]:
    """latents [rows, 4, size, size] channels-last, prompt embeddings, timesteps [rows, 4], and SDXL's extra ones."""
    size = config["sample_size"]
    with torch.device(device):
        inputs = {
            "latents": torch.randn(rows, 4, size, size).to(memory_format=torch.channels_last),
            "hidden": torch.randn(rows, 77, config["cross_attention_dim"]),
            "timesteps": torch.full((rows, 4), 500.0),
        }
        if config.get("addition_embed_type") == "text_time":
            inputs["pooled"] = torch.randn(rows, 1280)
            inputs["time_ids"] = torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]]).repeat(rows, 1)
    return inputs


def prepared(net: UNet, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Prepared, Tensor]:
    """The arguments of `net` for `inputs`: what all updates share is computed here, as the engine does."""
    given = {name: inputs[name] for name in ("hidden", "pooled", "time_ids") if name in inputs}
    shared = net.prepare(Conditioning(**given), inputs["timesteps"])
    latents = inputs["latents"].to(net.dtype)
    return latents, shared, torch.zeros(len(latents), dtype=torch.int64, device=latents.device)


class Update(nn.Module):
    """One update of guided rows: the U-Net's evaluation of both branches of every row, then `sampler_step`.

    Every op of it, the sampler's included, is called at a `Site`, so one op can be switched at a time.
    """

    def __init__(self, net: UNet, inputs: Mapping[str, Tensor]) -> None:
        """inputs: of `unet_inputs`, an even number of rows: prompt and negative prompt of each image in turn."""
        super().__init__()
        self.unet = net
        self.step = Site(sampler_step)
        self.inputs = dict(inputs)
        device = inputs["latents"].device
        images, latents = len(inputs["latents"]) // 2, inputs["latents"][::2].contiguous()
        table = torch.rand(images, LINES, len(Column), device=device)
        table[..., Column.CLAMP] = 4.0
        self.state = {
            "x": latents,
            "base": latents.clone(),
            "history": latents.unsqueeze(1).repeat(1, HISTORY, 1, 1, 1),
            "table": table,
            "update": torch.zeros(images, dtype=torch.int64, device=device),
            "weights": torch.tensor([7.5, -6.5], device=device).repeat(images, 1),
            "seeds": torch.arange(images, dtype=torch.int64, device=device),
        }
        self.arguments: tuple[Any, ...] = ()
        self.refresh()

    def refresh(self) -> None:
        """Compute what all updates share again, after the network's dtype has changed."""
        self.arguments = prepared(self.unet, self.inputs)

    def forward(self) -> Tensor:
        """The new state float32 [images, 4, size, size]."""
        raw = self.unet(*self.arguments)
        output = raw.unflatten(0, (-1, 2))
        return self.step(model_output=output.to(torch.float32), draws=0, **self.state)[0]


def deploy(net: Any, dtype: torch.dtype) -> None:
    """Put a network into the dtype and the channels-last memory that an engine gives it."""
    net.to(dtype).to(memory_format=torch.channels_last)


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    """Parameters made inside are of `dtype`; module.to(dtype) refuses fake tensors."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _randomise(net: Any) -> Any:
    net.eval().requires_grad_(False)
    for module in net.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 1:
                nn.init.kaiming_uniform_(parameter, a=5**0.5)  # torch's own default for these layers
            else:
                parameter.fill_(1.0 if name == "weight" else 0.0)
    return net
