"""The U-Net of latent and pixel diffusion models, split into what every update shares and what is left per update.

`prepare` runs once per request: in one GEMM each, the prompt's keys and values of every cross-attention layer and the
time projections of every residual block for every update. `forward` is the rest, with no host sync and no branch on
values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import RequestError
from .adapted import add_sides
from .layers import Attention, GroupNorm, Image, TimestepEmbedding, channels_last, sinusoid
from .projections import project
from .unet_blocks import DownBlock, MiddleBlock, ResBlock, Step, UpBlock
from .unet_config import UNetConfig


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """What the rows are conditioned on. A field the network does not use must be None, one it uses must be given."""

    hidden: Tensor | None = None  # [R, L, D] prompt
    pooled: Tensor | None = None  # [R, P] pooled prompt (SDXL text_embeds)
    time_ids: Tensor | None = None  # [R, 6] sizes and crops in pixels (SDXL); [R, 5] for its refiner
    class_labels: Tensor | None = None  # int64 [R]; [R, V] where the network takes class vectors
    timestep_cond: Tensor | None = None  # [R, W] guidance embedding (LCM); optional
    kv_len: Tensor | None = None  # int32 [R], tokens of the prompt that count; None: all


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Everything an update needs beside the latents. All tensors lead with the row dimension."""

    time: Tensor  # [R, U, sum over the blocks]
    kv: Tensor | None = None  # [R, L, sum over the layers]
    kv_len: Tensor | None = None  # int32 [R]
    loras: Tensor | None = None  # int64 [R, S, kinds] and [R, S]: as of `adapted.Chosen`, which `Adapted` reads
    strengths: Tensor | None = None

    @staticmethod
    def cat(parts: Sequence[Prepared]) -> Prepared:
        """The rows of all parts. Shorter tables and prompts are padded; `kv_len` keeps the padding out of attention."""
        updates = max(part.time.shape[1] for part in parts)
        time = torch.cat([F.pad(part.time, (0, 0, 0, updates - part.time.shape[1])) for part in parts])
        prompts = [(part, part.kv) for part in parts if part.kv is not None]
        if not prompts:
            return Prepared(time=time)
        assert len(prompts) == len(parts), "rows of networks with and without a prompt cannot be joined"
        length = max(kv.shape[1] for _, kv in prompts)
        kv = torch.cat([F.pad(kv, (0, 0, 0, length - kv.shape[1])) for _, kv in prompts])
        if all(part.kv_len is None and kv.shape[1] == length for part, kv in prompts):
            return Prepared(time=time, kv=kv)
        full = [torch.full((kv.shape[0],), kv.shape[1], dtype=torch.int32, device=kv.device) for _, kv in prompts]
        lengths = [own if part.kv_len is None else part.kv_len for (part, _), own in zip(prompts, full, strict=True)]
        return Prepared(time=time, kv=kv, kv_len=torch.cat(lengths))

    def at(self, update: Tensor) -> Step:
        """The inputs of one update; update: int64 [R], each row's own line of the time table."""
        index = update[:, None, None].expand(-1, 1, self.time.shape[2])
        return Step(self.time.gather(1, index).squeeze(1), self.kv, self.kv_len)


@dataclass(frozen=True)
class Residuals:
    """What a ControlNet adds to the skips of a U-Net, in the order they arise, and to its middle."""

    down: tuple[Tensor, ...]
    middle: Tensor


class Trunk(nn.Module):
    """The half of the U-Net that a ControlNet has, too: embeddings, way down, middle. Abstract."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        c, width, kernel = config, config.down[0].channels, config.conv_in_kernel
        self.config = config
        self.conv_in = nn.Conv2d(c.in_channels, width, kernel, padding=kernel // 2)
        self.time_embedding = TimestepEmbedding(c.sinusoid_dim, c.time_dim, c.time_cond_dim)
        self.class_embedding = _class_embedding(c)
        self.add_embedding = TimestepEmbedding(c.added_dim, c.time_dim) if c.added_time_dim else None
        self.encoder_hid_proj = nn.Linear(c.text_dim, c.blocks.cross_dim or 0) if c.text_dim else None
        widths = [width] + [level.channels for level in c.down]
        self.down_blocks = nn.ModuleList(
            DownBlock(w, level, c.blocks) for w, level in zip(widths, c.down, strict=False)
        )
        self.mid_block = MiddleBlock(c.middle, c.blocks) if c.middle else None

    def prepare(self, conditioning: Conditioning, timesteps: Tensor) -> Prepared:
        """Compute what all updates share. timesteps: float [R, U], the model's time at every update of every row.

        Raises RequestError where the conditioning is not what this network takes.
        """
        self._check(conditioning)
        embedding = F.silu(self._embed(conditioning, timesteps))  # [R, U, T]
        time = project(embedding, self._time_weights(), self._time_bias())
        time = add_sides(time, embedding, self._time_layers())
        if conditioning.hidden is None:
            return Prepared(time=time)
        hidden = conditioning.hidden.to(self.dtype)
        hidden = hidden if self.encoder_hid_proj is None else self.encoder_hid_proj(hidden)
        kv = add_sides(project(hidden, self._prompt_weights()), hidden, self._prompt_projections())
        return Prepared(time=time, kv=kv, kv_len=conditioning.kv_len)

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the weights; latents and conditioning are taken in it."""
        return self.conv_in.weight.dtype

    def descend(self, stem: Tensor, step: Step) -> tuple[Image, list[Image]]:
        """From the image after `conv_in` to the one after the middle, and the skips in the order they arise."""
        x = Image(stem)
        skips = [x]
        for block in self.down_blocks:
            x, more = block(x, step)
            skips += more
        return (x if self.mid_block is None else self.mid_block(x, step)), skips

    def stem(self, latents: Tensor) -> Tensor:
        """First convolution of the latents [R, C, h, w]."""
        x = channels_last(latents.to(self.dtype))
        return self.conv_in(2 * x - 1 if self.config.center_input else x)

    def stacks(self) -> list[list[str]]:
        """Names of the matrices that `prepare` multiplies with one input: a loader puts each list into one storage."""
        names = {id(parameter): name for name, parameter in self.named_parameters()}
        groups = (self._time_weights(), self._prompt_weights())
        return [[names[id(weight)] for weight in group] for group in groups if group]

    def _place(self) -> None:
        """Give every block its columns in the tables of `prepare`; called once all blocks exist."""
        start = 0
        for block in self._time_blocks():
            assert block.time_emb_proj is not None
            block.span = slice(start, start + block.time_emb_proj.out_features)
            start = block.span.stop
        start = 0
        for layer in self._prompt_layers():
            layer.span = slice(start, start + 2 * layer.channels)
            start = layer.span.stop

    def _time_weights(self) -> list[Tensor]:
        """Matrices [*, T] of the time projections, in the order of their columns in `Prepared.time`."""
        return [layer.weight for layer in self._time_layers()]

    def _time_layers(self) -> list[nn.Linear]:
        return [block.time_emb_proj for block in self._time_blocks() if block.time_emb_proj is not None]

    def _time_bias(self) -> Tensor:
        """Biases of all time projections; where they can, they hold that of conv1."""
        biases = []
        for block in self._time_blocks():
            assert block.time_emb_proj is not None
            first = block.conv1.bias if block.folded else None
            biases.append(block.time_emb_proj.bias if first is None else block.time_emb_proj.bias + first)
        return torch.cat(biases)

    def _prompt_weights(self) -> list[Tensor]:
        """Matrices [*, D] of the prompt's keys and values, in the order of their columns in `Prepared.kv`."""
        return [projection.weight for projection in self._prompt_projections()]

    def _prompt_projections(self) -> list[nn.Linear]:
        return [projection for layer in self._prompt_layers() for projection in (layer.to_k, layer.to_v)]

    def _time_blocks(self) -> list[ResBlock]:
        return [module for module in self.modules() if isinstance(module, ResBlock)]

    def _prompt_layers(self) -> list[Attention]:
        return [module for module in self.modules() if isinstance(module, Attention) and module.crossed]

    def _embed(self, conditioning: Conditioning, timesteps: Tensor) -> Tensor:
        """Embedding of every update [R, U, T] before its last activation."""
        c, cond = self.config, conditioning.timestep_cond
        t = self._sinusoid(timesteps, c.sinusoid_dim)
        embedding = self.time_embedding(t, None if cond is None else cond.to(self.dtype)[:, None])
        if self.class_embedding is not None:
            assert conditioning.class_labels is not None
            embedding = embedding + self._class_vector(conditioning.class_labels)[:, None]
        if self.add_embedding is not None:
            assert conditioning.pooled is not None
            assert conditioning.time_ids is not None
            sizes = self._sinusoid(conditioning.time_ids, c.added_time_dim or 0).flatten(1)
            added = torch.cat([conditioning.pooled.to(self.dtype), sizes], -1)
            embedding = embedding + self.add_embedding(added)[:, None]
        return embedding

    def _class_vector(self, labels: Tensor) -> Tensor:
        assert self.class_embedding is not None
        if self.config.class_embedding == "table":
            return self.class_embedding(labels)
        if self.config.class_embedding == "timestep":
            labels = self._sinusoid(labels, self.config.sinusoid_dim)
        return self.class_embedding(labels.to(self.dtype))

    def _sinusoid(self, t: Tensor, dim: int) -> Tensor:
        return sinusoid(t, dim, self.config.sine_first, self.config.frequency_shift).to(self.dtype)

    def _check(self, conditioning: Conditioning) -> None:
        c = self.config
        needs = {
            "hidden": c.blocks.cross_dim is not None,
            "pooled": c.added_time_dim is not None,
            "time_ids": c.added_time_dim is not None,
            "class_labels": c.class_embedding != "none",
        }
        for name, needed in needs.items():
            if needed and getattr(conditioning, name) is None:
                raise RequestError(f"this network is conditioned on {name}, but none was given")
            if not needed and getattr(conditioning, name) is not None:
                raise RequestError(f"this network takes no {name}: leave it out")
        if conditioning.timestep_cond is not None and c.time_cond_dim is None:
            raise RequestError("this network takes no timestep_cond (guidance embedding): leave it out")
        width, given = c.text_dim or c.blocks.cross_dim, conditioning.hidden
        if given is not None and given.shape[-1] != width:
            raise RequestError(f"prompt embeddings are {given.shape[-1]} wide; this network expects {width}")


class UNet(Trunk):
    """U-Net of SD 1/2/XL and their relatives, and of unconditional or class-conditional pixel models."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        c, width = config, config.down[0].channels
        skips = [width]
        for level in c.down:
            skips += [level.channels] * (level.layers + (level.resample != "none"))
        channels, blocks = c.down[-1].channels, []
        for level in c.up:
            taken = [skips.pop() for _ in range(level.layers)]
            blocks.append(UpBlock(channels, taken, level, c.blocks))
            channels = level.channels
        self.up_blocks = nn.ModuleList(blocks)
        self.conv_norm_out = GroupNorm(width, c.blocks.groups, c.blocks.eps)
        self.conv_out = nn.Conv2d(width, c.out_channels, c.conv_out_kernel, padding=c.conv_out_kernel // 2)
        self._place()

    def forward(
        self, latents: Tensor, prepared: Prepared, update: Tensor, *, residuals: Residuals | None = None
    ) -> Tensor:
        """The network's output [R, C_out, h, w] for latents [R, C_in, h, w] at each row's own update (int64 [R])."""
        step = prepared.at(update)
        x, skips = self.descend(self.stem(latents), step)
        if residuals is not None:
            skips = [Image(skip.x + extra) for skip, extra in zip(skips, residuals.down, strict=True)]
            x = Image(x.x + residuals.middle)
        for block in self.up_blocks:
            x = block(x, step, skips)
        return self.conv_out(self.conv_norm_out(x))


def _class_embedding(c: UNetConfig) -> nn.Module | None:
    match c.class_embedding:
        case "none":
            return None
        case "table":
            return nn.Embedding(c.class_dim, c.time_dim)
        case "timestep":
            return TimestepEmbedding(c.sinusoid_dim, c.time_dim)
        case "projection":
            return TimestepEmbedding(c.class_dim, c.time_dim)
        case "linear":
            return nn.Linear(c.class_dim, c.time_dim)
        case "identity":
            return nn.Identity()
