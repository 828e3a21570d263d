"""Convolution of a channels-last image, as one GEMM where a library would spend its time on the weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adapted import AdaptedConv2d

WIDTH_PER_SITE = 4
LARGE_WEIGHT = 1 << 20
"""On a CPU, oneDNN rearranges the whole weight in every call. Where an image has few sites for the width of the layer
that takes longer than the arithmetic, and one GEMM of its patches reads the weight as it lies; a weight of fewer
elements stays in the cache meanwhile. float32, one AVX-512 thread, 1280 -> 1280 at 8x8 sites: 37 ms -> 16 ms with one
row, 205 ms -> 187 ms with 16; a whole SD 1.5 update with 2 rows of 32x32 latents 3.4 s -> 2.6 s. 640 -> 640 at 16x16
would lose a little, 160 -> 160 at 4x4 with 32 rows a quarter. The rule looks at one image: all numbers of rows follow
the same."""


def convolve(conv: nn.Conv2d, x: Tensor, bias: bool = True) -> Tensor:
    """conv(x) for x [R, C, h, w], or without its bias where the next op adds it."""
    if x.device.type == "cpu" and not torch.compiler.is_compiling() and _few_sites(conv, x):
        y = multiply_patches(conv, x, bias)
    elif bias:
        return conv(x)  # its side path, if it has one, included
    else:
        y = F.conv2d(x, conv.weight, None, conv.stride, conv.padding)
    return conv.add(y, x) if isinstance(conv, AdaptedConv2d) else y


def multiply_patches(conv: nn.Conv2d, x: Tensor, bias: bool = True) -> Tensor:
    """`convolve` as a GEMM: every site's patch [k * k * C] times the weight, which is a view where channels-last."""
    (up, left), (down, right), kernel = conv.padding, conv.stride, conv.kernel_size
    assert isinstance(up, int)
    assert isinstance(left, int)
    x = F.pad(x, (left, left, up, up)) if up or left else x
    patches = x.unfold(2, kernel[0], down).unfold(3, kernel[1], right).permute(0, 2, 3, 4, 5, 1)  # [R, h, w, k, k, C]
    weight = conv.weight.permute(0, 2, 3, 1).flatten(1)
    return F.linear(patches.flatten(3), weight, conv.bias if bias else None).permute(0, 3, 1, 2)


def _few_sites(conv: nn.Conv2d, x: Tensor) -> bool:
    sites = x.shape[-2] * x.shape[-1] // (conv.stride[0] * conv.stride[1])
    return WIDTH_PER_SITE * sites <= conv.out_channels and conv.weight.numel() >= LARGE_WEIGHT
