"""The networks behind the inputs and outputs of exported graphs: plain tensors, named as diffusers names them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..engine.models.controlnet import ControlNet
from ..engine.models.unet import Conditioning, Prepared, Residuals, Trunk, UNet
from ..engine.models.unet_blocks import Step
from ..engine.models.vae import AutoencoderKL
from ..kernels import sampler_step
from ..kernels.sampler_step.columns import Column


class Now(Prepared):
    """What one update reads, prepared in the same graph: there is no table of updates to look it up in."""

    def at(self, update: Tensor) -> Step:
        """The only update there is."""
        return Step(self.time[:, 0], self.kv, self.kv_len)


class DenoiserGraph(nn.Module):
    """One evaluation of a U-Net: conditioning and latents in, the prediction out."""

    def __init__(self, net: UNet) -> None:
        super().__init__()
        self.net = net

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | None = None,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        **residuals: Tensor,
    ) -> tuple[Tensor, ...]:
        """sample: [R, C, h, w]; timestep: [R], or [1] for all rows; residuals: of a ControlNet, the middle's last."""
        given = Conditioning(
            hidden=encoder_hidden_states,
            pooled=text_embeds,
            time_ids=time_ids,
            class_labels=class_labels,
            timestep_cond=timestep_cond,
        )
        *down, middle = residuals.values() or (None,)
        extra = None if middle is None else Residuals(tuple(down), middle)
        return (self.net(sample, prepare(self.net, given, timestep, sample), _nothing(sample), residuals=extra),)


class ControlNetGraph(nn.Module):
    """One evaluation of a ControlNet, its image included."""

    def __init__(self, net: ControlNet) -> None:
        super().__init__()
        self.net = net

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        controlnet_cond: Tensor,
        conditioning_scale: Tensor,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """controlnet_cond: [R, 3, H, W] in 0..1; conditioning_scale: [R]."""
        given = Conditioning(hidden=encoder_hidden_states, pooled=text_embeds, time_ids=time_ids)
        now = prepare(self.net, given, timestep, sample)
        image = self.net.prepare_image(controlnet_cond)
        found: Residuals = self.net(sample, now, _nothing(sample), image, conditioning_scale)
        return (*found.down, found.middle)


class UpdateGraph(nn.Module):
    """Denoiser, guidance sum and one line of every row's sampler table as one graph, for two guidance branches."""

    def __init__(self, net: UNet) -> None:
        super().__init__()
        self.net = net

    def forward(
        self,
        x: Tensor,
        base: Tensor,
        history: Tensor,
        model_input: Tensor,
        table: Tensor,
        update: Tensor,
        weights: Tensor,
        noise: Tensor,
        **conditioning: Tensor,
    ) -> tuple[Tensor, ...]:
        """Arguments and results of `sampler_step`; conditioning: of the model rows (cond, uncond of row 0, then row 1)

        noise: [R, 2, C, h, w], of this and of the previous update (`sampling/noise.py`).
        """
        line = update.clamp(0, table.shape[1] - 1)[:, None]
        timestep = table[..., Column.TIMESTEP].gather(1, line).expand(-1, 2).flatten()
        latents = model_input[:, None].expand(-1, 2, -1, -1, -1).flatten(0, 1).to(self.net.dtype)
        (output,) = DenoiserGraph(self.net)(latents, timestep, **conditioning)
        outputs = output.unflatten(0, (-1, 2)).to(x.dtype)
        seeds = torch.zeros_like(update)
        return sampler_step(x, base, history, outputs, table, update, weights, seeds, extra_noise=noise)


class DecoderGraph(nn.Module):
    """Latents in the autoencoder's own scale to an image."""

    def __init__(self, net: AutoencoderKL) -> None:
        super().__init__()
        self.net = net

    def forward(self, latent_sample: Tensor) -> tuple[Tensor]:
        """[R, C, h, w] -> [R, 3, H, W], about -1..1."""
        return (self.net.decode(latent_sample),)


class EncoderGraph(nn.Module):
    """An image to mean and log variance of its latents, in the autoencoder's own scale."""

    def __init__(self, net: AutoencoderKL) -> None:
        super().__init__()
        self.net = net

    def forward(self, sample: Tensor) -> tuple[Tensor]:
        """[R, 3, H, W] in -1..1 -> [R, 2 C, h, w]."""
        found = self.net.encode(sample)
        return (torch.cat([found.mean, found.logvar], 1),)


class TextGraph(nn.Module):
    """A CLIP text encoder: every hidden state, since pipelines differ in the one they take."""

    def __init__(self, net: nn.Module, projected: bool) -> None:
        super().__init__()
        self.net, self.projected = net, projected

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        """input_ids: int32 [P, L]."""
        out: Any = self.net(input_ids.long(), output_hidden_states=True)
        if self.projected:
            return (out.text_embeds, out.last_hidden_state, *out.hidden_states)
        return (out.last_hidden_state, out.pooler_output, *out.hidden_states)


def prepare(net: Trunk, conditioning: Conditioning, timestep: Tensor, sample: Tensor) -> Now:
    """Everything `net` reads in one update. One timestep serves all rows, as diffusers' pipelines give it."""
    rows = sample.shape[0]
    found = net.prepare(conditioning, timestep.repeat(rows)[:rows, None])
    return Now(time=found.time, kv=found.kv, kv_len=found.kv_len)


def _nothing(like: Tensor) -> Tensor:
    """The update index nobody reads."""
    return torch.zeros((), dtype=torch.int64, device=like.device)
