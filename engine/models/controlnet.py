"""ControlNet (Zhang et al. 2023): a U-Net's way down fed an extra image; its outputs are added to the U-Net's skips."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CheckpointError
from .layers import channels_last
from .unet import Prepared, Residuals, Trunk
from .unet_config import UNetConfig


@dataclass(frozen=True, kw_only=True)
class ControlNetConfig:
    """Structure of a ControlNet: the trunk it shares with a U-Net and the entry of its image."""

    trunk: UNetConfig
    image_channels: int = 3
    image_widths: tuple[int, ...] = (16, 32, 96, 256)
    reverse_channels: bool = False  # the image is expected blue first
    pool: bool = False  # residuals are averaged over the image

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> ControlNetConfig:
        """Read a `config.json` of ControlNetModel. Raises CheckpointError for a structure not built here."""
        own = {
            "conditioning_channels": 3,
            "conditioning_embedding_out_channels": (16, 32, 96, 256),
            "controlnet_conditioning_channel_order": "rgb",
            "global_pool_conditions": False,
        }
        given = {k: config[k] if config.get(k) is not None else default for k, default in own.items()}
        order = given["controlnet_conditioning_channel_order"]
        if order not in ("rgb", "bgr"):
            raise CheckpointError(
                f"controlnet_conditioning_channel_order={order!r} is not supported; supported: rgb, bgr"
            )
        return cls(
            trunk=UNetConfig.from_diffusers({k: v for k, v in config.items() if k not in own}),
            image_channels=given["conditioning_channels"],
            image_widths=tuple(given["conditioning_embedding_out_channels"]),
            reverse_channels=order == "bgr",
            pool=bool(given["global_pool_conditions"]),
        )


class ImageEntry(nn.Module):
    """The control image at the resolution and width of the latents: convolutions with SiLU, halving between widths."""

    def __init__(self, config: ControlNetConfig, channels: int) -> None:
        super().__init__()
        widths = config.image_widths
        self.conv_in = nn.Conv2d(config.image_channels, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for narrow, wide in pairwise(widths):
            self.blocks.append(nn.Conv2d(narrow, narrow, 3, padding=1))
            self.blocks.append(nn.Conv2d(narrow, wide, 3, padding=1, stride=2))
        self.conv_out = nn.Conv2d(widths[-1], channels, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        """image: [R, C, h * 2^n, w * 2^n] in 0..1; returns [R, channels, h, w]."""
        x = F.silu(self.conv_in(image))
        for conv in self.blocks:
            x = F.silu(conv(x))
        return self.conv_out(x)


class ControlNet(Trunk):
    """ControlNet of SD 1/2/XL. `prepare` as for the U-Net; the image, too, is embedded once: `prepare_image`."""

    def __init__(self, config: ControlNetConfig) -> None:
        super().__init__(config.trunk)
        self.control = config
        levels = config.trunk.down
        self.controlnet_cond_embedding = ImageEntry(config, levels[0].channels)
        widths = [levels[0].channels]
        for level in levels:
            widths += [level.channels] * (level.layers + (level.resample != "none"))
        self.controlnet_down_blocks = nn.ModuleList(nn.Conv2d(width, width, 1) for width in widths)
        self.controlnet_mid_block = nn.Conv2d(levels[-1].channels, levels[-1].channels, 1)
        self._place()

    def prepare_image(self, image: Tensor) -> Tensor:
        """Embed the control image [R, C, H, W] (0..1, red first), the same in every update: [R, channels, h, w]."""
        image = channels_last(image.to(self.dtype))
        return self.controlnet_cond_embedding(image.flip(1) if self.control.reverse_channels else image)

    def forward(self, latents: Tensor, prepared: Prepared, update: Tensor, image: Tensor, scale: Tensor) -> Residuals:
        """Residuals for the U-Net.

        latents: [R, C, h, w]; update: int64 [R]; image: from `prepare_image`; scale: [R], or [R, n + 1] with one factor
        for each of the n skips and the middle (`guess_scales`).
        """
        x, skips = self.descend(self.stem(latents) + image, prepared.at(update))
        outputs = [conv(skip.x) for conv, skip in zip(self.controlnet_down_blocks, skips, strict=True)]
        outputs.append(self.controlnet_mid_block(x.x))
        if self.control.pool:
            outputs = [t.mean((2, 3), keepdim=True) for t in outputs]
        factors = scale.to(self.dtype).reshape(scale.shape[0], -1).expand(-1, len(outputs))
        outputs = [t * factors[:, i, None, None, None] for i, t in enumerate(outputs)]
        return Residuals(tuple(outputs[:-1]), outputs[-1])

    @property
    def scales(self) -> int:
        """Factors of one update, n + 1: one for every skip and one for the middle."""
        return len(self.controlnet_down_blocks) + 1

    def guess_scales(self, scale: Tensor) -> Tensor:
        """Factors of guess mode [R, n + 1] from scales [R]: from a tenth at the first skip to one in the middle."""
        return scale[:, None] * torch.logspace(-1, 0, self.scales, dtype=scale.dtype, device=scale.device)
