"""A whole model with random weights, text encoders included, so that the engine can be measured at full size.

Nothing is downloaded. Prompts are read by the built-in model's tokenizer; their embeddings and the pictures mean
nothing, but every update costs what it costs with trained weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..engine.binding import Binder
from ..engine.components import Components, control_binder
from ..engine.conditioning.text import TextEncoder, load_tokenizer
from ..engine.config import EngineConfig, ResolvedConfig, resolve
from ..engine.families import FAMILIES, builtin_folder
from ..engine.loras import RowLoRAs
from ..engine.sampling.scheduler_config import SchedulerConfig
from ..engine.weights.lora_file import LoRA, LowRank
from .architectures import TEXT, architecture
from .random_networks import autoencoder, controlnet, deploy, unet

SCHEDULER = {
    "_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000, "prediction_type": "epsilon", "clip_sample": False, "set_alpha_to_one": False,
    "steps_offset": 1,
}  # fmt: skip
"""Of Stable Diffusion 1.x and XL."""
DEFAULTS = {"steps": 20, "guidance_scale": 5.0}
ENCODERS = {768: (12, 12), 1280: (32, 20), 1024: (23, 16)}
"""Layers and heads of the CLIP text encoders by their width."""


def random_model(arch: str, config: EngineConfig) -> Components:
    """The components of an architecture ("sd15", "sd2", "sdxl", "tiny") on their device; the same for the same device.

    Weights are made in float32 and then cast, so models of two dtypes differ by rounding only. Raises ValueError for an
    unknown architecture, DeviceError or RequestError for options this machine cannot honour.
    """
    found, settled = architecture(arch), resolve(config)
    torch.manual_seed(0)
    denoiser, vae = unet(found.unet, settled.device), autoencoder(found.vae, settled.device)
    deploy(denoiser, settled.dtype)
    deploy(vae, settled.vae_dtype)
    width = found.unet["cross_attention_dim"]
    two = found.unet.get("addition_embed_type") == "text_time"
    family = FAMILIES["sdxl" if two else "sd"]
    widths = (width - 1280, 1280) if two else (width,)
    return Components(
        name=f"{arch} with random weights",
        family=family,
        config=settled,
        denoiser=denoiser,
        scheduler=SchedulerConfig.from_diffusers(SCHEDULER),
        text=tuple(_encoder(own, two, settled) for own in widths),
        vae=vae,
        zero_negative=two,
        defaults=DEFAULTS,
        binders={"unet": Binder(denoiser, settled), "vae": Binder(vae, settled)},
    )


def with_controlnet(parts: Components, name: str) -> Components:
    """The same model with a ControlNet of random weights that requests call `name`."""
    config = parts.config
    torch.manual_seed(0)
    net = controlnet(parts.unet.config, parts.scale, config.device)
    deploy(net, config.dtype)
    binders = {**parts.binders, control_binder(name): Binder(net, config)}
    return replace(parts, controlnets={**parts.controlnets, name: net}, binders=binders)


def with_loras(parts: Components, ranks: Mapping[str, int]) -> Components:
    """The same model with LoRAs of these names and ranks on all its attention layers, of random weights, that requests
    choose from. The networks of `parts` get side paths, which change nothing for requests without LoRAs.
    """
    generator = torch.Generator().manual_seed(0)

    def update(layer: str, weight: torch.Tensor, rank: int) -> LowRank:
        outputs, inputs = weight.shape
        down, up = (torch.randn(shape, generator=generator) for shape in ((rank, inputs), (outputs, rank)))
        return LowRank("unet", layer, (layer,), down * inputs**-0.5, up, None, rank**-0.5)

    layers = {name: module.weight for name, module in parts.unet.named_modules()
              if isinstance(module, nn.Linear) and ".attn" in name and not name.endswith("to_qkv")}  # fmt: skip
    made = {name: LoRA(name, tuple(update(layer, weight, rank) for layer, weight in layers.items()))
            for name, rank in ranks.items()}  # fmt: skip
    return replace(parts, loras=RowLoRAs(made, {"unet": parts.unet}))


def _encoder(width: int, two: bool, config: ResolvedConfig) -> TextEncoder:
    """A CLIP text encoder of this width; in a pair every one gives its last hidden state but one, and a projection."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokenizer: Any = load_tokenizer(builtin_folder("shapes") / "tokenizer")
    tokenizer.model_max_length = TEXT
    layers, heads = ENCODERS.get(width, (2, 1))
    made = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width, projection_dim=width,
        num_hidden_layers=layers, num_attention_heads=heads, max_position_embeddings=TEXT,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with torch.device(config.device):
        model: Any = CLIPTextModelWithProjection(made) if two else CLIPTextModel(made)
    return TextEncoder(model.eval().requires_grad_(False).to(config.dtype), tokenizer, two)
