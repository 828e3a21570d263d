"""Layers the networks are made of: the one place in `models` that calls kernels.

Images are [R, C, h, w] in channels-last memory, so their token view [R, h*w, C] is free. R is the number of rows.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import add_layer_norm, attention, bias_residual_add, geglu, group_norm_silu, layer_norm
from ...kernels.dispatch import Site
from .convolution import convolve


class Image(NamedTuple):
    """An image [R, C, h, w] and, where a fused op has just written it, its partial statistics for the next norm."""

    x: Tensor
    stats: Tensor | None = None


class GroupNorm(nn.Module):
    """Group normalisation, by default followed by SiLU; every argument of forward is folded into the same kernel."""

    def __init__(self, channels: int, groups: int, eps: float, silu: bool = True) -> None:
        super().__init__()
        self.groups, self.eps, self.silu = groups, eps, silu
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels))
        self.op = Site(group_norm_silu)

    def forward(
        self,
        image: Image,
        *,
        pre_bias: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        skip: Image | None = None,
    ) -> Tensor:
        """skip: more channels, normalised as if concatenated; pre_bias, scale, shift: [R or 1, C]."""
        x2, stats = None, image.stats
        if skip is not None:
            x2 = skip.x
            stats = None if stats is None or skip.stats is None else torch.cat([stats, skip.stats], -1)
        return self.op(
            image.x,
            self.weight,
            self.bias,
            self.groups,
            self.eps,
            self.silu,
            pre_bias=pre_bias,
            scale=scale,
            shift=shift,
            x2=x2,
            partial_stats=stats,
        )


class ResidualAdd(nn.Module):
    """The exit of a block: branch + residual, and the statistics of the sum where the op is fused."""

    def __init__(self) -> None:
        super().__init__()
        self.op = Site(bias_residual_add)

    @property
    def fused(self) -> bool:
        """Whether the branch's bias is to be left to this op."""
        return self.op.fused

    def forward(self, x: Tensor, bias: Tensor | None, residual: Tensor) -> Image:
        """x, residual: [R, C, h, w]; bias: [C], only where `fused`."""
        if self.fused:
            return Image(*self.op(x, bias, residual))
        return Image(x + residual)


class LayerNorm(nn.Module):
    """Layer normalisation of tokens [R, L, C] with epsilon 1e-5, the value of every transformer block here."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels))
        self.op = Site(layer_norm)

    def forward(self, x: Tensor) -> Tensor:
        """x: [R, L, C]."""
        return self.op(x, self.weight, self.bias, 1e-5)


class AddLayerNorm(nn.Module):
    """x + residual, and its layer normalisation; the parameters of a `LayerNorm`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels))
        self.op = Site(add_layer_norm)

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """x, residual: [R, L, C]; returns the normalised sum and the sum."""
        return self.op(x, residual, self.weight, self.bias, 1e-5)


class Attention(nn.Module):
    """Multi-head attention of tokens over themselves, or over the prompt by keys and values projected beforehand."""

    def __init__(self, channels: int, heads: int, context_dim: int | None = None) -> None:
        super().__init__()
        self.heads, self.channels = heads, channels
        self.crossed = context_dim is not None
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_dim or channels, channels, bias=False)
        self.to_v = nn.Linear(context_dim or channels, channels, bias=False)
        self.to_qkv: nn.Linear | None = None  # transforms.fuse_qkv replaces the three above
        self.to_out = nn.Sequential(nn.Linear(channels, channels))
        self.op = Site(attention)
        self.span = slice(0, 0)  # where this layer's keys and values lie in Prepared.kv; set by the network

    def forward(self, x: Tensor, kv: Tensor | None = None, kv_len: Tensor | None = None) -> Tensor:
        """x: [R, L, C]; kv: [R, Lk, *] all layers' keys and values (cross-attention only); kv_len: int32 [R]."""
        if self.crossed:
            assert kv is not None, "cross-attention needs the prepared keys and values"
            parts = (self.to_q(x), *kv[..., self.span].chunk(2, -1))
        else:
            parts, kv_len = project_qkv(self, x), None
        q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in parts)  # [R, L, H, D]
        return self.to_out(self.op(q, k, v, kv_len=kv_len).flatten(2))


class SelfAttention2d(nn.Module):
    """x + attention(group_norm(x)) over the sites of an image: autoencoders and unconditional U-Nets."""

    def __init__(self, channels: int, heads: int, groups: int | None, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.group_norm = None if groups is None else GroupNorm(channels, groups, eps, silu=False)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_qkv: nn.Linear | None = None  # transforms.fuse_qkv replaces the three above
        self.to_out = nn.Sequential(nn.Linear(channels, channels))
        self.op = Site(attention)
        self.exit = ResidualAdd()

    def forward(self, image: Image) -> Image:
        """image: [R, C, h, w]."""
        tokens = to_tokens(image.x if self.group_norm is None else self.group_norm(image))
        q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in project_qkv(self, tokens))
        return self.exit(to_image(self.to_out(self.op(q, k, v).flatten(2)), image.x), None, image.x)


class FeedForward(nn.Module):
    """linear(geglu(linear(x))), four times as wide inside (Shazeer 2020)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        gate = nn.Module()
        gate.proj = nn.Linear(channels, 8 * channels)
        self.net = nn.ModuleDict({"0": gate, "2": nn.Linear(4 * channels, channels)})
        self.op = Site(geglu)

    def forward(self, x: Tensor) -> Tensor:
        """x: [R, L, C]."""
        return self.net["2"](self.op(self.net["0"].get_submodule("proj")(x)))


class Downsample(nn.Module):
    """Halve an image with a strided 3x3 convolution; padding 0 means one zero row and column at the end."""

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.padding = padding
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        """x: [R, C, h, w]."""
        return convolve(self.conv, x if self.padding else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Enlarge an image to `size` by nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.folded: nn.Parameter | None = None  # transforms.fold_upsample: both steps as one transposed convolution

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """x: [R, C, h, w]; size: the height and width to reach."""
        if self.folded is not None and size == (2 * x.shape[-2], 2 * x.shape[-1]):
            return F.conv_transpose2d(x, self.folded, self.conv.bias, stride=2, padding=1)
        return convolve(self.conv, nearest(x, size))


class TimestepEmbedding(nn.Module):
    """linear(silu(linear(x))): from a sinusoid or a vector to the embedding all blocks read."""

    def __init__(self, in_dim: int, dim: int, cond_dim: int | None = None) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, dim)
        self.linear_2 = nn.Linear(dim, dim)
        self.cond_proj = None if cond_dim is None else nn.Linear(cond_dim, in_dim, bias=False)

    def forward(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """x: [..., in_dim]; cond: broadcastable [..., cond_dim], added to x through its own projection."""
        if cond is not None:
            assert self.cond_proj is not None, "this embedding has no projection for a condition"
            x = x + self.cond_proj(cond)
        return self.linear_2(F.silu(self.linear_1(x)))


def sinusoid(t: Tensor, dim: int, sine_first: bool, frequency_shift: float) -> Tensor:
    """Sinusoidal embedding of t [...] -> float32 [..., dim] (Vaswani et al. 2017; Ho et al. 2020).

    Always float32, whatever the network's dtype: checkpoints were trained with these very values.
    """
    half = dim // 2
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / (half - frequency_shift)
    angle = t[..., None].float() * torch.exp(exponent)
    parts = [angle.sin(), angle.cos()] if sine_first else [angle.cos(), angle.sin()]
    return F.pad(torch.cat(parts, -1), (0, dim % 2))


def project_qkv(layer: Attention | SelfAttention2d, x: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values [R, L, C] of tokens: three projections, or views of one where they are fused."""
    if layer.to_qkv is not None:
        return layer.to_qkv(x).chunk(3, -1)
    return layer.to_q(x), layer.to_k(x), layer.to_v(x)


def to_tokens(x: Tensor) -> Tensor:
    """[R, C, h, w] -> [R, h*w, C], a view when x is channels-last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def to_image(tokens: Tensor, like: Tensor) -> Tensor:
    """[R, h*w, C] -> channels-last [R, C, h, w] with the height and width of `like`, a view."""
    return tokens.unflatten(1, like.shape[-2:]).permute(0, 3, 1, 2)


def channels_last(x: Tensor) -> Tensor:
    """x [R, C, h, w] in the memory layout all image layers work in."""
    return x.contiguous(memory_format=torch.channels_last)


def concat_channels(x: Tensor, skip: Tensor | None) -> Tensor:
    """[R, C1, h, w] and [R, C2, h, w] -> [R, C1 + C2, h, w]."""
    return x if skip is None else torch.cat([x, skip], 1)


def nearest(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Nearest-neighbour resize of [R, C, h, w]."""
    return F.interpolate(x, size=size, mode="nearest")


def halve(x: Tensor) -> Tensor:
    """Mean of every 2x2 patch of [R, C, h, w]."""
    return F.avg_pool2d(x, 2)
