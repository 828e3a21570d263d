"""Floating-point operations of one update of a loaded model, counted on fake tensors: nothing is computed."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from ..engine.models.unet import Conditioning, UNet
from ..engine.models.unet_config import UNetConfig

TEXT = 77  # tokens of a CLIP prompt


def _attention(query: torch.Size, key: torch.Size, value: torch.Size, *_: object, **__: object) -> int:
    return sdpa_flop_count(query, key, value)


ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}  # torch's own table leaves it out


def of_update(config: UNetConfig, model_rows: int, height: int, width: int) -> int:
    """Operations of products, convolutions and attention in one evaluation; a multiply-add counts two.

    model_rows: rows of the evaluation, two per guided image. height, width: of the latents. What all updates share
    (prompt keys and values, timestep embeddings) is prepared before and not counted.
    """
    with torch.no_grad(), FakeTensorMode():
        net = UNet(config).eval().requires_grad_(False)
        given: dict[str, torch.Tensor] = {}
        dim = config.text_dim or config.blocks.cross_dim
        if dim:
            given["hidden"] = torch.empty(model_rows, TEXT, dim)
        if config.added_time_dim:
            given["pooled"] = torch.empty(model_rows, config.added_dim - 6 * config.added_time_dim)
            given["time_ids"] = torch.empty(model_rows, 6)
        if config.class_embedding != "none":
            given["class_labels"] = torch.zeros(model_rows, dtype=torch.int64)
        prepared = net.prepare(Conditioning(**given), torch.zeros(model_rows, 1))
        latents = torch.empty(model_rows, config.in_channels, height, width)
        with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
            net(latents, prepared, torch.zeros(model_rows, dtype=torch.int64))
    return counter.get_total_flops()
