"""Tiny diffusers networks with the structure of published ones: real block types and head sizes, small widths."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch

from .random_weights import randomize

CROSS_DOWN, DOWN, SELF_DOWN = "CrossAttnDownBlock2D", "DownBlock2D", "AttnDownBlock2D"
CROSS_UP, UP, SELF_UP = "CrossAttnUpBlock2D", "UpBlock2D", "AttnUpBlock2D"

# attention_head_dim counts heads here: 40 and 80 channels per head, as in SD 1.x
SD = {
    "sample_size": 8,
    "block_out_channels": (40, 80, 80, 80),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 32,
    "attention_head_dim": 1,
}
SD2 = SD | {
    "block_out_channels": (64, 128, 128, 128),
    "attention_head_dim": (1, 2, 2, 2),
    "use_linear_projection": True,
    "upcast_attention": True,
}
SDXL = {
    "sample_size": 8,
    "down_block_types": (DOWN, CROSS_DOWN, CROSS_DOWN),
    "up_block_types": (CROSS_UP, CROSS_UP, UP),
    "block_out_channels": (32, 64, 128),
    "layers_per_block": 1,
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (1, 1, 2),
    "norm_num_groups": 8,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 32,
    "cross_attention_dim": 64,
}
REFINER = SDXL | {
    "down_block_types": (DOWN, CROSS_DOWN, CROSS_DOWN, DOWN),
    "up_block_types": (UP, CROSS_UP, CROSS_UP, UP),
    "block_out_channels": (32, 64, 64, 64),
    "transformer_layers_per_block": 2,
    "attention_head_dim": (1, 1, 1, 1),
    "projection_class_embeddings_input_dim": 5 * 8 + 32,
    "cross_attention_dim": 32,
}
UPSCALER = {
    "sample_size": 16,
    "in_channels": 7,
    "out_channels": 4,
    "block_out_channels": (32, 64, 64),
    "down_block_types": (DOWN, CROSS_DOWN, CROSS_DOWN),
    "up_block_types": (CROSS_UP, CROSS_UP, UP),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 32,
    "attention_head_dim": 2,
    "use_linear_projection": True,
    "only_cross_attention": (True, True, False),
    "num_class_embeds": 1000,
}
# google/ddpm-*: one head per attention, padding at the end only, sines first
DDPM = {
    "sample_size": 16,
    "block_out_channels": (32, 32, 64),
    "down_block_types": (DOWN, SELF_DOWN, DOWN),
    "up_block_types": (UP, SELF_UP, UP),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}
# openai/guided-diffusion: classes, scale and shift, residual blocks that change the resolution
ADM = {
    "sample_size": 16,
    "out_channels": 6,
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("ResnetDownsampleBlock2D", SELF_DOWN, SELF_DOWN),
    "up_block_types": (SELF_UP, SELF_UP, "ResnetUpsampleBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 32,
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "resnet_time_scale_shift": "scale_shift",
    "attn_norm_num_groups": 8,
    "num_class_embeds": 10,
}
LDM_SR = {
    "sample_size": 16,
    "in_channels": 6,
    "block_out_channels": (32, 64, 64),
    "down_block_types": (DOWN, DOWN, SELF_DOWN),
    "up_block_types": (SELF_UP, UP, UP),
    "layers_per_block": 2,
    "norm_num_groups": 8,
    "attention_head_dim": 32,
}
CONTROL = {"conditioning_embedding_out_channels": (16, 16, 32, 32)}

UNETS: dict[str, tuple[str, dict[str, Any]]] = {
    "sd15": ("UNet2DConditionModel", SD),
    "sd2": ("UNet2DConditionModel", SD2),
    "sdxl": ("UNet2DConditionModel", SDXL),
    "sdxl_refiner": ("UNet2DConditionModel", REFINER),
    "sd15_inpaint9": ("UNet2DConditionModel", SD | {"in_channels": 9}),
    "lcm": ("UNet2DConditionModel", SD | {"time_cond_proj_dim": 16}),
    "x4_upscaler": ("UNet2DConditionModel", UPSCALER),
    "ddpm": ("UNet2DModel", DDPM),
    "adm": ("UNet2DModel", ADM),
    "adm_no_middle_norm": ("UNet2DModel", ADM | {"attn_norm_num_groups": None}),
    "ldm_sr": ("UNet2DModel", LDM_SR),
    "no_middle_attention": ("UNet2DModel", LDM_SR | {"add_attention": False}),
    # a depth per layer, the middle a single residual block (distilled SDXL)
    "depth_per_layer": (
        "UNet2DConditionModel",
        SDXL
        | {
            "transformer_layers_per_block": ((0,), (1,), (2,)),
            "reverse_transformer_layers_per_block": ((2, 1), (1, 2), (0, 0)),
            "mid_block_type": "UNetMidBlock2D",
        },
    ),
    "no_middle": ("UNet2DConditionModel", SD | {"mid_block_type": None, "center_input_sample": True}),
    "prompt_projection": ("UNet2DConditionModel", SD | {"encoder_hid_dim": 24}),
    "class_vector": (
        "UNet2DConditionModel",
        SD | {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 12},
    ),
    "class_linear": (
        "UNet2DConditionModel",
        SD | {"class_embed_type": "simple_projection", "projection_class_embeddings_input_dim": 12},
    ),
    "class_identity": ("UNet2DConditionModel", SD | {"class_embed_type": "identity"}),
    "class_timestep": ("UNet2DConditionModel", SD | {"class_embed_type": "timestep"}),
    "wide_kernels": ("UNet2DConditionModel", SD | {"conv_in_kernel": 1, "conv_out_kernel": 5}),
    "cross_and_self": (
        "UNet2DConditionModel",
        SD | {"down_block_types": (CROSS_DOWN, SELF_DOWN, CROSS_DOWN, DOWN), "layers_per_block": (1, 2, 1, 1)},
    ),
}
CONTROLNETS: dict[str, dict[str, Any]] = {
    "sd15": {k: v for k, v in SD.items() if k != "sample_size"} | CONTROL,
    "sdxl": {k: v for k, v in SDXL.items() if k not in ("sample_size", "up_block_types")} | CONTROL,
    "sdxl_mid": {k: v for k, v in SDXL.items() if k not in ("sample_size", "up_block_types")}
    | CONTROL
    | {"transformer_layers_per_block": (0, 0, 1)},
    "shuffle": {k: v for k, v in SD.items() if k != "sample_size"} | CONTROL | {"global_pool_conditions": True},
    "bgr": {k: v for k, v in SD.items() if k != "sample_size"}
    | CONTROL
    | {"controlnet_conditioning_channel_order": "bgr"},
}


def vae(latent_channels: int = 4, widths: tuple[int, ...] = (8, 8, 16, 16), **more: Any) -> dict[str, Any]:
    """Configuration of a small autoencoder; the number of widths gives its factor."""
    return {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
        "block_out_channels": widths,
        "layers_per_block": 1,
        "latent_channels": latent_channels,
        "norm_num_groups": 4,
        "sample_size": 64,
    } | more


VAES: dict[str, tuple[str, dict[str, Any]]] = {
    "f8": ("AutoencoderKL", vae()),
    "f4": ("AutoencoderKL", vae(widths=(8, 16, 16), scaling_factor=0.08333)),
    "f8_16ch": (
        "AutoencoderKL",
        vae(16, use_quant_conv=False, use_post_quant_conv=False, scaling_factor=1.5305, shift_factor=0.0609),
    ),
    "no_middle_attention": ("AutoencoderKL", vae(mid_block_add_attention=False)),
    "vq_f4": ("VQModel", vae(3, (8, 16, 16), num_vq_embeddings=24)),
    "vq_attention": (
        "VQModel",
        vae(4, (8, 16), vq_embed_dim=6, num_vq_embeddings=24)
        | {
            "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
            "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        },
    ),
}


def build_network(name: str, folder: Path) -> torch.nn.Module:
    """Build, randomise and save the network `kind/name` (unet/sd15, controlnet/sdxl, vae/f8); returns it in float64."""
    kind, _, key = name.partition("/")
    table: dict[str, Callable[[], tuple[str, dict[str, Any]]]] = {
        "unet": lambda: UNETS[key],
        "controlnet": lambda: ("ControlNetModel", CONTROLNETS[key]),
        "vae": lambda: VAES[key],
    }
    cls, config = table[kind]()
    module = getattr(diffusers, cls)(**config)
    randomize(module, name)
    module.save_pretrained(folder)
    return module.double()
