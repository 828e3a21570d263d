"""Residual, transformer, down, middle and up blocks: shared by U-Nets, ControlNets and autoencoders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from .convolution import convolve
from .layers import (
    AddLayerNorm,
    Attention,
    Downsample,
    FeedForward,
    GroupNorm,
    Image,
    LayerNorm,
    ResidualAdd,
    SelfAttention2d,
    Upsample,
    concat_channels,
    halve,
    nearest,
    to_image,
    to_tokens,
)
from .unet_config import BlockOptions, Level


@dataclass(frozen=True)
class Step:
    """What the blocks read in one update beside the image; the autoencoders' blocks read nothing."""

    time: Tensor | None = None  # [R, sum of the blocks' channels]
    kv: Tensor | None = None  # [R, L, sum of the layers' keys and values]
    kv_len: Tensor | None = None  # int32 [R]


class ResBlock(nn.Module):
    """shortcut(x) + conv(norm_silu(conv(norm_silu(x)) + time)) (Ho et al. 2020; Dhariwal & Nichol 2021)."""

    def __init__(
        self, in_channels: int, channels: int, options: BlockOptions, resample: Literal["up", "down"] | None = None
    ) -> None:
        super().__init__()
        self.resample: Literal["up", "down"] | None = resample
        self.scale_shift = options.scale_shift
        self.norm1 = GroupNorm(in_channels, options.groups, options.eps)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.time_emb_proj = None
        if options.time_dim is not None:
            self.time_emb_proj = nn.Linear(options.time_dim, channels * (2 if options.scale_shift else 1))
        self.norm2 = GroupNorm(channels, options.groups, options.eps)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_shortcut = None if in_channels == channels else nn.Conv2d(in_channels, channels, 1)
        self.exit = ResidualAdd()
        self.span = slice(0, 0)  # where this block's projection lies in Step.time; set by the network

    @property
    def folded(self) -> bool:
        """Whether the time projection holds conv1's bias: both are added before the second norm."""
        return self.time_emb_proj is not None and not self.scale_shift

    def forward(
        self, image: Image, step: Step, skip: Image | None = None, size: tuple[int, int] | None = None
    ) -> Image:
        """image: [R, C, h, w]; skip: more channels of the input; size: what a block that upsamples has to reach."""
        x = concat_channels(image.x, None if skip is None else skip.x)
        h = self.norm1(image, skip=skip) if self.norm1.op.fused else self.norm1(Image(x))
        if self.resample is not None:
            change = _resampler(self.resample, size)
            x, h = change(x), change(h)
        h = convolve(self.conv1, h, bias=not self._bias_in_norm)
        h = self._second_norm(h, step)
        h = convolve(self.conv2, h, bias=not self.exit.fused)
        return self.exit(h, self.conv2.bias, x if self.conv_shortcut is None else convolve(self.conv_shortcut, x))

    @property
    def _bias_in_norm(self) -> bool:
        """Whether conv1's bias is added inside the second norm, which can take it with the time embedding or alone."""
        return self.folded or self.norm2.op.fused

    def _second_norm(self, h: Tensor, step: Step) -> Tensor:
        """norm2(h), h being conv1's output, with the time embedding and, where it is still missing, conv1's bias."""
        if self.folded:
            assert step.time is not None
            return self.norm2(Image(h), pre_bias=step.time[:, self.span])
        bias = self.conv1.bias
        pre_bias = bias[None] if bias is not None and self._bias_in_norm else None
        if self.time_emb_proj is None:
            return self.norm2(Image(h), pre_bias=pre_bias)
        assert step.time is not None
        scale, shift = step.time[:, self.span].chunk(2, 1)
        return self.norm2(Image(h), pre_bias=pre_bias, scale=scale, shift=shift)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the prompt and feed-forward, each on normalised tokens and added.

    The feed-forward's sum is left to the next block, whose first normalisation reads it anyway.
    """

    def __init__(self, channels: int, level: Level, options: BlockOptions, first: bool) -> None:
        super().__init__()
        self.norm1 = LayerNorm(channels) if first else AddLayerNorm(channels)
        self.attn1 = Attention(channels, level.heads, options.cross_dim if level.cross_only else None)
        self.norm2 = AddLayerNorm(channels)
        self.attn2 = Attention(channels, level.heads, options.cross_dim)
        self.norm3 = AddLayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, branch: Tensor | None, step: Step) -> tuple[Tensor, Tensor]:
        """x, branch: [R, L, C], what the block before returned: its output is their sum. No branch: the first block."""
        if branch is None:
            normed = self.norm1(x)
        else:
            normed, x = self.norm1(branch, x)
        normed, x = self.norm2(self.attn1(normed, step.kv, step.kv_len), x)
        normed, x = self.norm3(self.attn2(normed, step.kv, step.kv_len), x)
        return x, self.ff(normed)


class Transformer2d(nn.Module):
    """x + transformer blocks over the sites of the normalised image (Rombach et al. 2022)."""

    def __init__(self, depth: int, level: Level, options: BlockOptions) -> None:
        super().__init__()
        self.norm = GroupNorm(level.channels, options.groups, 1e-6, silu=False)
        self.proj_in = nn.Linear(level.channels, level.channels)
        blocks = [TransformerBlock(level.channels, level, options, first=i == 0) for i in range(depth)]
        self.transformer_blocks = nn.ModuleList(blocks)
        self.proj_out = nn.Linear(level.channels, level.channels)
        self.exit = ResidualAdd()

    def forward(self, image: Image, step: Step) -> Image:
        """image: [R, C, h, w]."""
        tokens, branch = self.proj_in(to_tokens(self.norm(image))), None
        for block in self.transformer_blocks:
            tokens, branch = block(tokens, branch, step)
        tokens = tokens if branch is None else tokens + branch
        return self.exit(to_image(self.proj_out(tokens), image.x), None, image.x)


class DownBlock(nn.Module):
    """Residual blocks with attention, then half the resolution."""

    def __init__(self, in_channels: int, level: Level, options: BlockOptions) -> None:
        super().__init__()
        widths = [in_channels] + [level.channels] * (level.layers - 1)
        self.resnets = nn.ModuleList(ResBlock(width, level.channels, options) for width in widths)
        self.attentions = _attentions(level, options, options.groups)
        self.downsamplers = nn.ModuleList()
        if level.resample == "conv":
            self.downsamplers.append(Downsample(level.channels, options.downsample_padding))
        elif level.resample == "resnet":
            self.downsamplers.append(ResBlock(level.channels, level.channels, options, resample="down"))

    def forward(self, x: Image, step: Step) -> tuple[Image, list[Image]]:
        """Returns the image for the next level and the skips for the way up, in the order they arise."""
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, step)
            if self.attentions:
                x = _attend(self.attentions[i], x, step)
            skips.append(x)
        for downsampler in self.downsamplers:
            x = downsampler(x, step) if isinstance(downsampler, ResBlock) else Image(downsampler(x.x))
            skips.append(x)
        return x, skips


class MiddleBlock(nn.Module):
    """One residual block, then pairs of attention and residual block."""

    def __init__(self, level: Level, options: BlockOptions) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(level.channels, level.channels, options) for _ in range(level.layers + 1))
        self.attentions = _attentions(level, options, options.middle_groups)

    def forward(self, x: Image, step: Step) -> Image:
        """x: [R, C, h, w]."""
        x = self.resnets[0](x, step)
        for i, resnet in enumerate(list(self.resnets)[1:]):
            if self.attentions:
                x = _attend(self.attentions[i], x, step)
            x = resnet(x, step)
        return x


class UpBlock(nn.Module):
    """Residual blocks with attention, each also fed a skip where there are any, then twice the resolution."""

    def __init__(self, in_channels: int, skip_channels: list[int], level: Level, options: BlockOptions) -> None:
        super().__init__()
        widths = [in_channels] + [level.channels] * (level.layers - 1)
        self.skips = len(skip_channels)
        extra = skip_channels or [0] * level.layers
        self.resnets = nn.ModuleList(
            ResBlock(width + more, level.channels, options) for width, more in zip(widths, extra, strict=True)
        )
        self.attentions = _attentions(level, options, options.groups)
        self.upsamplers = nn.ModuleList()
        if level.resample == "conv":
            self.upsamplers.append(Upsample(level.channels))
        elif level.resample == "resnet":
            self.upsamplers.append(ResBlock(level.channels, level.channels, options, resample="up"))

    def forward(self, x: Image, step: Step, skips: list[Image]) -> Image:
        """x: [R, C, h, w]; takes its skips from the end of `skips` and enlarges x to the size of the next one, if any.

        Sizes that were odd on the way down are met this way, too.
        """
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, step, skip=skips.pop() if self.skips else None)
            if self.attentions:
                x = _attend(self.attentions[i], x, step)
        for upsampler in self.upsamplers:
            height, width = skips[-1].x.shape[-2:] if skips else (2 * x.x.shape[-2], 2 * x.x.shape[-1])
            if isinstance(upsampler, ResBlock):
                x = upsampler(x, step, size=(height, width))
            else:
                x = Image(upsampler(x.x, (height, width)))
        return x


def _attentions(level: Level, options: BlockOptions, groups: int | None) -> nn.ModuleList:
    """One attention layer per residual block of the level; empty without attention."""
    if level.attention == "cross":
        return nn.ModuleList(Transformer2d(depth, level, options) for depth in level.depth)
    if level.attention == "self":
        return nn.ModuleList(
            SelfAttention2d(level.channels, level.heads, groups, options.eps) for _ in range(level.layers)
        )
    return nn.ModuleList()


def _attend(layer: nn.Module, x: Image, step: Step) -> Image:
    return layer(x, step) if isinstance(layer, Transformer2d) else layer(x)


def _resampler(resample: Literal["up", "down"], size: tuple[int, int] | None) -> Callable[[Tensor], Tensor]:
    if resample == "down":
        return halve
    assert size is not None, "a block that upsamples needs the size to reach"
    return lambda x: nearest(x, size)
