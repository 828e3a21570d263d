"""A U-Net and its ControlNets as one network, for the rows of requests that have control images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from .controlnet import ControlNet
from .unet import Conditioning, Prepared, Residuals, Trunk, UNet


@dataclass(frozen=True, kw_only=True)
class ControlledPrepared:
    """`Prepared` of the U-Net and of every ControlNet, side by side. All tensors lead with the row dimension.

    The scales stand in the time table, so whatever moves a row along its plan moves them along, too.
    """

    time: Tensor  # [R, U, *]: projections of the U-Net, then of every ControlNet, then the scales of every ControlNet
    images: Tensor  # [R, N, h, w, channels], embedded
    kv: Tensor | None = None  # [R, L, *]: of the U-Net, then of every ControlNet
    kv_len: Tensor | None = None  # int32 [R]
    loras: Tensor | None = None  # as in `Prepared`
    strengths: Tensor | None = None

    @staticmethod
    def cat(parts: Sequence[ControlledPrepared]) -> ControlledPrepared:
        """The rows of all parts, which have equally many updates and tokens."""
        names = [name for name, value in vars(parts[0]).items() if value is not None]
        return replace(parts[0], **{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


class Controlled(nn.Module):
    """The U-Net, to whose skips and middle N ControlNets add (Zhang et al. 2023), called as the U-Net itself.

    Every ControlNet runs in every update, also where its scale is 0: an update is the same work whatever the scales, so
    a captured or compiled one serves all of them.
    """

    def __init__(self, unet: UNet, nets: Sequence[ControlNet]) -> None:
        super().__init__()
        self.config = unet.config
        self.unet, self.nets = unet, nn.ModuleList(nets)
        widths = [columns(part) for part in (unet, *nets)]
        self._time = _spans([time for time, _ in widths] + [net.scales for net in nets])
        self._kv = _spans([kv for _, kv in widths])

    @property
    def columns(self) -> tuple[int, int]:
        """As `columns` of all parts together, the scales included."""
        return self._time[-1].stop, self._kv[-1].stop

    @property
    def controlnets(self) -> list[ControlNet]:
        """The ControlNets, in the order of their names."""
        return [net for net in self.nets if isinstance(net, ControlNet)]

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the weights."""
        return self.unet.dtype

    def prepare(
        self, conditioning: Conditioning, timesteps: Tensor, images: Sequence[Tensor], scales: Sequence[Tensor]
    ) -> ControlledPrepared:
        """As `UNet.prepare`; for every ControlNet its image [1 or R, 3, H, W] in 0..1 and its scales [R, U, n + 1].

        A scale is the factor of one of the n skips, or of the middle, at one update of one row.
        """
        unet = self.unet.prepare(conditioning, timesteps)
        nets = [net.prepare(_known(net, conditioning), timesteps) for net in self.controlnets]
        embedded = [net.prepare_image(image) for net, image in zip(self.controlnets, images, strict=True)]
        sites = torch.stack([image.permute(0, 2, 3, 1) for image in embedded], 1)
        kv = [part.kv for part in (unet, *nets) if part.kv is not None]
        return ControlledPrepared(
            time=torch.cat([unet.time, *(net.time for net in nets), *(scale.to(unet.time) for scale in scales)], -1),
            images=sites.expand(len(timesteps), *sites.shape[1:]).contiguous(),
            kv=torch.cat(kv, -1) if kv else None,
            kv_len=unet.kv_len,
        )

    def forward(self, latents: Tensor, prepared: ControlledPrepared, update: Tensor) -> Tensor:
        """As the U-Net. A ControlNet sees the latents only, not what an inpainting U-Net takes beside them."""
        total: Residuals | None = None
        for i, net in enumerate(self.controlnets):
            image = prepared.images[:, i].permute(0, 3, 1, 2)
            scale = _at(prepared.time[..., self._time[1 + len(self.nets) + i]], update)
            own = self._part(prepared, 1 + i)
            total = _sum(total, net(latents[:, : net.config.in_channels], own, update, image, scale))
        return self.unet(latents, self._part(prepared, 0), update, residuals=total)

    def _part(self, prepared: ControlledPrepared, index: int) -> Prepared:
        """What the U-Net (0) or a ControlNet (from 1 on) reads."""
        kv = self._kv[index]
        own = None if prepared.kv is None or kv.start == kv.stop else prepared.kv[..., kv]
        return Prepared(time=prepared.time[..., self._time[index]], kv=own, kv_len=prepared.kv_len)


def columns(net: Trunk) -> tuple[int, int]:
    """Widths of what `prepare` computes: of an update's time, of a token's keys and values."""
    time, *prompt = [sum(net.get_parameter(name).shape[0] for name in stack) for stack in net.stacks()]
    return time, sum(prompt)


def _spans(widths: Sequence[int]) -> list[slice]:
    return [slice(start, stop) for start, stop in pairwise(accumulate(widths, initial=0))]


def _at(table: Tensor, update: Tensor) -> Tensor:
    """Every row's own line [R, *] of a table [R, U, *]."""
    return table.gather(1, update[:, None, None].expand(-1, 1, table.shape[2])).squeeze(1)


def _known(net: Trunk, conditioning: Conditioning) -> Conditioning:
    """The conditioning without the guidance embedding of a distilled U-Net, which its ControlNets do not take."""
    return conditioning if net.config.time_cond_dim is not None else replace(conditioning, timestep_cond=None)


def _sum(total: Residuals | None, more: Residuals) -> Residuals:
    if total is None:
        return more
    down = tuple(a + b for a, b in zip(total.down, more.down, strict=True))
    return Residuals(down, total.middle + more.middle)
