"""One launch: a program holds a few whole groups of one row in registers, and reads and writes them once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..launch import Compilation, launcher
from ..moments import tile_offsets, tile_start
from .arguments import Image, Vectors
from .config import OnePass, heuristic, power_of_two


@triton.jit
def group_norm_kernel(
    x,
    x2,
    y,
    weight,
    bias,
    pre_bias,
    scale,
    shift,
    sites,
    channels1,
    channels2,
    groups,
    pre_bias_stride,
    scale_stride,
    shift_stride,
    eps,
    SILU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    GROUP_SET: tl.constexpr,
):
    """x: [B, channels1, sites], x2: [B, channels2, sites] or None, y: both; grid: sets of groups, B."""
    b = tl.program_id(1).to(tl.int64)
    s = tl.arange(0, BLOCK_S)[:, None, None]
    g = tl.program_id(0) * GROUP_SET + tl.arange(0, GROUP_SET)[None, :, None]
    k = tl.arange(0, BLOCK_C)[None, None, :]
    c = g * WIDTH + k
    known = (k < WIDTH) & (g < groups)
    inside = (s < sites) & known
    channels = channels1 + channels2

    at = tile_start(b, 0, 0, sites, channels1, CHANNELS_LAST) + tile_offsets(s, c, sites, channels1, CHANNELS_LAST)
    if x2 is None:
        v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    else:  # a group may straddle the seam
        left = c < channels1
        v = tl.load(x + at, mask=inside & left, other=0.0).to(tl.float32)
        at = tile_start(b, 0, 0, sites, channels2, CHANNELS_LAST)
        at += tile_offsets(s, c - channels1, sites, channels2, CHANNELS_LAST)
        v += tl.load(x2 + at, mask=inside & (c >= channels1), other=0.0).to(tl.float32)
    if pre_bias is not None:
        v += tl.load(pre_bias + b * pre_bias_stride + c, mask=known, other=0.0).to(tl.float32)

    count = sites * (WIDTH * 1.0)
    centre = tl.sum(tl.sum(tl.where(inside, v, 0.0), 0), 1) / count  # [GROUP_SET]
    v = tl.where(inside, v - centre[None, :, None], 0.0)
    rest = tl.sum(tl.sum(v, 0), 1) / count  # what rounding left of the mean
    var = tl.maximum(tl.sum(tl.sum(v * v, 0), 1) / count - rest * rest, 0.0)
    rstd = tl.rsqrt(var + eps)[None, :, None]

    gain = tl.load(weight + c, mask=known, other=0.0).to(tl.float32)
    offset = tl.load(bias + c, mask=known, other=0.0).to(tl.float32)
    if scale is not None:
        factor = 1.0 + tl.load(scale + b * scale_stride + c, mask=known, other=0.0).to(tl.float32)
        gain, offset = gain * factor, offset * factor
    if shift is not None:
        offset += tl.load(shift + b * shift_stride + c, mask=known, other=0.0).to(tl.float32)
    v = (v - rest[None, :, None]) * (rstd * gain) + offset
    if SILU:
        v = v * tl.sigmoid(v)
    at = tile_start(b, 0, 0, sites, channels, CHANNELS_LAST) + tile_offsets(s, c, sites, channels, CHANNELS_LAST)
    tl.store(y + at, v.to(y.dtype.element_ty), mask=inside)


def launch(config: OnePass, image: Image, y: torch.Tensor, vectors: Vectors, groups: int, eps: float, silu: bool):
    """Run the kernel under `config`, writing `y`."""
    width = image.channels // groups
    launcher(group_norm_kernel)[(triton.cdiv(groups, config.group_set), image.rows)](
        image.x,
        image.x2,
        y,
        *vectors.tensors,
        image.sites,
        image.channels1,
        image.channels2,
        groups,
        *vectors.strides,
        eps,
        SILU=silu,
        CHANNELS_LAST=image.channels_last,
        WIDTH=width,
        BLOCK_S=power_of_two(image.sites),
        BLOCK_C=power_of_two(width),
        GROUP_SET=config.group_set,
        **config.options.kwargs(),
    )


def compilations() -> list[Compilation]:
    """Every specialisation that launches on real shapes make: those of SD 1.5 up to 32 x 32 and small autoencoders."""
    shapes = [(1280, 0, 64), (1280, 0, 256), (640, 0, 1024), (640, 0, 256), (320, 0, 1024), (320, 0, 256)]
    skips = [(1280, 1280, 64), (1280, 1280, 256), (1280, 640, 256), (640, 320, 1024)]
    both = [(dtype, c1, c2, sites) for dtype in ("bf16", "fp16") for c1, c2, sites in shapes + skips]
    made = [_compilation(*case, channels_last=True) for case in both]
    made += [_compilation("bf16", *shape, channels_last=True, pre_bias=True) for shape in shapes[:3]]
    made += [_compilation("bf16", *shape, channels_last=True, silu=False) for shape in shapes[:3]]
    made += [_compilation("bf16", *shape, channels_last=True, modulated=True) for shape in shapes[:3]]
    made += [_compilation("fp32", *shape, channels_last=True) for shape in (*shapes[:2], skips[0], skips[2])]
    made += [_compilation(dtype, *shape, channels_last=False) for dtype in ("bf16", "fp32") for shape in shapes[:2]]
    return [
        *made,
        _compilation("bf16", *skips[1], channels_last=False),
        _compilation("bf16", 320, 0, 256, True, rows=32),
    ]


def _compilation(
    dtype: str,
    channels1: int,
    channels2: int,
    sites: int,
    channels_last: bool,
    rows: int = 2,
    silu: bool = True,
    pre_bias: bool = False,
    modulated: bool = False,
) -> Compilation:
    width = (channels1 + channels2) // 32
    config = heuristic(rows, 32, width, sites, itemsize=4 if dtype == "fp32" else 2)
    assert isinstance(config, OnePass)
    present = {"x2": channels2 > 0, "pre_bias": pre_bias, "scale": modulated, "shift": modulated}
    absent = [name for name, there in present.items() if not there]
    pointers = [p for p in ("x", "x2", "y", "weight", "bias", "pre_bias", "scale", "shift") if p not in absent]
    integers = ["sites", "channels1", "channels2", "groups", "pre_bias_stride", "scale_stride", "shift_stride"]
    extras = "".join(f" {name}" for name, there in present.items() if there) + (" silu" if silu else "")
    layout = "channels-last" if channels_last else "contiguous"
    return Compilation(
        name=f"one pass, {dtype}, {channels1} + {channels2} x {sites}, {layout},{extras or ' plain'}, {rows} rows",
        kernel=group_norm_kernel,
        signature={p: f"*{dtype}" for p in pointers} | dict.fromkeys(integers, "i32") | {"eps": "fp32"},
        constants=dict.fromkeys(absent)
        | {"SILU": silu, "CHANNELS_LAST": channels_last, "WIDTH": width, "GROUP_SET": config.group_set}
        | {"BLOCK_S": power_of_two(sites), "BLOCK_C": power_of_two(width)},
        options=config.options,
        divisible=frozenset({*pointers, *integers}),
    )
