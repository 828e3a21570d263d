"""ControlNets against diffusers in float64, alone and added to their U-Net."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference.networks import CONTROLNETS
from reference.parity import GATE, error, ours
from reference.random_weights import normal

from stepfuse.engine.errors import CheckpointError
from stepfuse.engine.models.controlnet import ControlNet, ControlNetConfig
from stepfuse.engine.models.unet import Conditioning, UNet

TIMESTEPS = torch.tensor([[900.0, 500.0], [700.0, 20.0]], dtype=torch.float64)
UPDATE = torch.tensor([1, 0])


def inputs(net: ControlNet, size: tuple[int, int]) -> dict[str, Any]:
    """Latents, image, prompt of two rows; the image is 8 times as large as the latents."""
    config = net.config
    given: dict[str, Any] = {"hidden": normal("hidden", 2, 7, config.blocks.cross_dim or 0)}
    if config.added_time_dim:
        given["pooled"] = normal("pooled", 2, 32)
        given["time_ids"] = torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2, dtype=torch.float64)
    image = normal("image", 2, 3, 8 * size[0], 8 * size[1]).sigmoid()
    return {"latents": normal("x", 2, 4, *size), "image": image, "cond": Conditioning(**given)}


def reference(module: Any, given: dict[str, Any], **more: Any) -> tuple[list[torch.Tensor], torch.Tensor]:
    """What diffusers computes."""
    cond = given["cond"]
    return module(
        given["latents"],
        TIMESTEPS.gather(1, UPDATE[:, None])[:, 0],
        encoder_hidden_states=cond.hidden,
        controlnet_cond=given["image"],
        added_cond_kwargs={"text_embeds": cond.pooled, "time_ids": cond.time_ids},
        return_dict=False,
        **more,
    )


@pytest.mark.parametrize("size", [(8, 8), (12, 6)], ids=["square", "odd"])
@pytest.mark.parametrize("name", CONTROLNETS)
@torch.inference_mode()
def test_controlnet_matches_diffusers(name: str, size: tuple[int, int], reference_network: Any) -> None:
    module, folder = reference_network(f"controlnet/{name}")
    net = ours(folder)
    assert isinstance(net, ControlNet)
    given = inputs(net, size)
    scale = torch.tensor([0.8, 0.8], dtype=torch.float64)
    prepared, image = net.prepare(given["cond"], TIMESTEPS), net.prepare_image(given["image"])
    got = net(given["latents"], prepared, UPDATE, image, scale)
    down, middle = reference(module, given, conditioning_scale=0.8)
    assert len(got.down) == len(down)
    assert max(error(a, b) for a, b in zip((*got.down, got.middle), (*down, middle), strict=True)) <= GATE


@torch.inference_mode()
def test_guess_mode(reference_network: Any) -> None:
    module, folder = reference_network("controlnet/sd15")
    net = ours(folder)
    assert isinstance(net, ControlNet)
    given = inputs(net, (8, 8))
    scales = net.guess_scales(torch.full((2,), 0.7))
    prepared, image = net.prepare(given["cond"], TIMESTEPS), net.prepare_image(given["image"])
    got = net(given["latents"], prepared, UPDATE, image, scales)
    down, middle = reference(module, given, conditioning_scale=0.7, guess_mode=True)
    assert max(error(a, b) for a, b in zip((*got.down, got.middle), (*down, middle), strict=True)) <= GATE


@torch.inference_mode()
def test_scale_is_per_row(reference_network: Any) -> None:
    net = ours(reference_network("controlnet/sd15")[1])
    assert isinstance(net, ControlNet)
    given = inputs(net, (8, 8))
    prepared, image = net.prepare(given["cond"], TIMESTEPS), net.prepare_image(given["image"])
    one = net(given["latents"], prepared, UPDATE, image, torch.ones(2))
    mixed = net(given["latents"], prepared, UPDATE, image, torch.tensor([0.0, 0.5]))
    assert mixed.middle[0].abs().max() == 0
    assert error(mixed.middle[1], 0.5 * one.middle[1]) <= 1e-15


@pytest.mark.parametrize("name", ["sd15", "shuffle"])
@torch.inference_mode()
def test_residuals_reach_the_unet(name: str, reference_network: Any) -> None:
    module, folder = reference_network(f"controlnet/{name}")
    unet_module, unet_folder = reference_network("unet/sd15")
    net, unet = ours(folder), ours(unet_folder)
    assert isinstance(net, ControlNet)
    assert isinstance(unet, UNet)
    given = inputs(net, (12, 9))
    image = net.prepare_image(given["image"])
    residuals = net(given["latents"], net.prepare(given["cond"], TIMESTEPS), UPDATE, image, torch.ones(2).double())
    prepared = unet.prepare(given["cond"], TIMESTEPS)
    got = unet(given["latents"], prepared, UPDATE, residuals=residuals)
    down, middle = reference(module, given)
    expected = unet_module(
        given["latents"],
        TIMESTEPS.gather(1, UPDATE[:, None])[:, 0],
        given["cond"].hidden,
        down_block_additional_residuals=down,
        mid_block_additional_residual=middle,
    ).sample
    assert error(got, expected) <= GATE
    assert error(unet(given["latents"], prepared, UPDATE), expected) > 1e-2


def test_unknown_structures_are_refused() -> None:
    with pytest.raises(CheckpointError, match="controlnet_conditioning_channel_order='grb'"):
        ControlNetConfig.from_diffusers({"controlnet_conditioning_channel_order": "grb"})
    with pytest.raises(CheckpointError, match="act_fn='gelu'"):
        ControlNetConfig.from_diffusers({"_class_name": "ControlNetModel", "act_fn": "gelu"})


XL = {
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


@pytest.mark.parametrize(
    ("config", "parameters", "tensors"),
    [
        ({"cross_attention_dim": 768}, 361_279_120, 340),
        (XL | {"transformer_layers_per_block": [1, 2, 10]}, 1_251_014_160, 844),
        (XL | {"transformer_layers_per_block": [0, 0, 1]}, 272_586_000, 224),
    ],
    ids=["sd15", "sdxl", "sdxl_mid"],
)
def test_published_sizes(config: dict[str, Any], parameters: int, tensors: int) -> None:
    parsed = ControlNetConfig.from_diffusers({"_class_name": "ControlNetModel"} | config)
    with torch.device("meta"):
        net = ControlNet(parsed)
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert len(net.state_dict()) == tensors
