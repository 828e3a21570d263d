"""Three launches: statistics per channel and run of sites, one affine map per row and channel from them, its use.

The statistics are the partial statistics that `bias_residual_add` returns; given those, the first launch is left out.
The affine map holds everything else (mean, variance, pre_bias, weight, bias, scale, shift), as (x - centre) * gain +
offset: the last launch is an elementwise kernel at the speed of memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..launch import Compilation, Options, launcher
from ..moments import merge_lanes, source_of, tile_offsets, tile_start, welford
from ..statistics import run_count, sites_per_run
from .arguments import Image, Vectors
from .config import TwoPass, heuristic, power_of_two

AFFINE_OPTIONS = Options(num_warps=4, num_stages=1)


def runs_at_once(width: int) -> int:
    """Runs in a tile of the statistics of one group: 1024 values, 8 in each thread."""
    return max(1, 1024 // power_of_two(width))


@triton.jit
def statistics_kernel(
    x,
    x2,
    stats,
    sites,
    channels1,
    channels2,
    run,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """stats: [B, runs, 2, channels1 + channels2]; grid: runs, blocks of channels of x and then of x2, B."""
    b = tl.program_id(2).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * run
    length = tl.minimum(run, sites - first).to(tl.int32)
    source, width, c0, before = source_of(tl.program_id(1), x, x2, channels1, channels2, BLOCK_C)  # pyright: ignore[reportGeneralTypeIssues]
    c = tl.arange(0, BLOCK_C)
    s = tl.arange(0, BLOCK_S)
    at = tile_offsets(s[:, None], c[None, :], sites, width, CHANNELS_LAST)
    known = c0 + c < width
    mean = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    for done in range(0, length, BLOCK_S):
        inside = (done + s < length)[:, None] & known[None, :]
        start = tile_start(b, first + done, c0, sites, width, CHANNELS_LAST)
        v = tl.load(source + start + at, mask=inside, other=0.0).to(tl.float32)
        mean, squares = welford(mean, squares, v, inside, (done // BLOCK_S + 1) * 1.0)
    centre, total = merge_lanes(mean, squares, length, BLOCK_S)
    channels = channels1 + channels2
    out = stats + (b * tl.num_programs(0) + tl.program_id(0)) * 2 * channels + before + c0 + c
    tl.store(out, centre, mask=known)
    tl.store(out + channels, total, mask=known)


@triton.jit
def affine_kernel(
    stats,
    affine,
    weight,
    bias,
    pre_bias,
    scale,
    shift,
    sites,
    channels,
    run,
    pre_bias_stride,
    scale_stride,
    shift_stride,
    eps,
    WIDTH: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """stats: [B, runs, 2, channels]; affine: [B, 3, channels], centre, gain and offset; grid: groups, B."""
    b = tl.program_id(1).to(tl.int64)
    k = tl.arange(0, BLOCK_C)
    r = tl.arange(0, BLOCK_R)
    c = tl.program_id(0) * WIDTH + k
    known = k < WIDTH
    runs = tl.cdiv(sites, run)
    source = stats + b * runs * 2 * channels + c[None, :]
    added = tl.zeros([BLOCK_C], tl.float32)
    if pre_bias is not None:
        added = tl.load(pre_bias + b * pre_bias_stride + c, mask=known, other=0.0).to(tl.float32)
    count = sites * (WIDTH * 1.0)

    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for done in range(0, runs, BLOCK_R):
        at = (done + r).to(tl.int64)[:, None]
        inside = (at < runs) & known[None, :]
        share = tl.minimum(run, sites - at * run).to(tl.float32) / count
        mean = tl.load(source + at * 2 * channels, mask=inside, other=0.0) + added[None, :]
        total += tl.where(inside, mean * share, 0.0)
    centre = tl.sum(tl.sum(total, 0), 0)

    linear = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    square = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for done in range(0, runs, BLOCK_R):
        at = (done + r).to(tl.int64)[:, None]
        inside = (at < runs) & known[None, :]
        share = tl.minimum(run, sites - at * run).to(tl.float32) / count
        mean = tl.load(source + at * 2 * channels, mask=inside, other=0.0) + added[None, :]
        own = tl.load(source + (at * 2 + 1) * channels, mask=inside, other=0.0)
        apart = tl.where(inside, mean - centre, 0.0)
        linear += apart * share
        square += own / count + apart * apart * share
    rest = tl.sum(tl.sum(linear, 0), 0)  # what rounding left of the mean
    var = tl.maximum(tl.sum(tl.sum(square, 0), 0) - rest * rest, 0.0)

    gain = tl.load(weight + c, mask=known, other=0.0).to(tl.float32)
    offset = tl.load(bias + c, mask=known, other=0.0).to(tl.float32)
    if scale is not None:
        factor = 1.0 + tl.load(scale + b * scale_stride + c, mask=known, other=0.0).to(tl.float32)
        gain, offset = gain * factor, offset * factor
    if shift is not None:
        offset += tl.load(shift + b * shift_stride + c, mask=known, other=0.0).to(tl.float32)
    gain = gain * tl.rsqrt(var + eps)
    out = affine + b * 3 * channels + c
    tl.store(out, tl.zeros([BLOCK_C], tl.float32) + centre, mask=known)
    tl.store(out + channels, gain, mask=known)
    tl.store(out + 2 * channels, (added - rest) * gain + offset, mask=known)


@triton.jit
def normalise_kernel(
    x,
    x2,
    y,
    affine,
    sites,
    channels1,
    channels2,
    SILU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y = (x - centre) * gain + offset, then SiLU; grid: blocks of sites, blocks of channels of x and of x2, B."""
    # From the end: what the statistics pass read last is what the L2 cache still holds.
    b = (tl.num_programs(2) - 1 - tl.program_id(2)).to(tl.int64)
    first = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64) * BLOCK_S
    source, width, c0, before = source_of(tl.program_id(1), x, x2, channels1, channels2, BLOCK_C)  # pyright: ignore[reportGeneralTypeIssues]
    channels = channels1 + channels2
    c = tl.arange(0, BLOCK_C)
    s = tl.arange(0, BLOCK_S)
    known = c0 + c < width
    inside = (first + s < sites)[:, None] & known[None, :]
    start = tile_start(b, first, c0, sites, width, CHANNELS_LAST)
    at = tile_offsets(s[:, None], c[None, :], sites, width, CHANNELS_LAST)
    v = tl.load(source + start + at, mask=inside, other=0.0).to(tl.float32)
    vectors = affine + b * 3 * channels + before + c0 + c
    centre = tl.load(vectors, mask=known, other=0.0)
    gain = tl.load(vectors + channels, mask=known, other=0.0)
    offset = tl.load(vectors + 2 * channels, mask=known, other=0.0)
    v = (v - centre[None, :]) * gain[None, :] + offset[None, :]
    if SILU:
        v = v * tl.sigmoid(v)
    start = tile_start(b, first, before + c0, sites, channels, CHANNELS_LAST)
    at = tile_offsets(s[:, None], c[None, :], sites, channels, CHANNELS_LAST)
    tl.store(y + start + at, v.to(y.dtype.element_ty), mask=inside)


def launch(
    config: TwoPass,
    image: Image,
    y: torch.Tensor,
    vectors: Vectors,
    groups: int,
    eps: float,
    silu: bool,
    stats: torch.Tensor | None,
) -> None:
    """Run the kernels under `config`, writing `y`; with `stats` the statistics kernel is left out."""
    rows, sites, channels, width = image.rows, image.sites, image.channels, image.channels // groups
    blocks = triton.cdiv(image.channels1, config.block_c) + triton.cdiv(image.channels2, config.block_c)
    tiles = {"CHANNELS_LAST": image.channels_last, "BLOCK_S": config.block_s, "BLOCK_C": config.block_c}
    options, run = config.options.kwargs(), sites_per_run(sites)
    source = (image.x, image.x2)
    widths = (image.channels1, image.channels2)
    if stats is None:
        shape = (rows, run_count(sites), 2, channels)
        stats = torch.empty(shape, dtype=torch.float32, device=y.device)
        grid = (run_count(sites), blocks, rows)
        launcher(statistics_kernel)[grid](*source, stats, sites, *widths, run, **tiles, **options)
    affine = torch.empty((rows, 3, channels), dtype=torch.float32, device=y.device)
    launcher(affine_kernel)[(groups, rows)](
        stats.contiguous(),
        affine,
        *vectors.tensors,
        sites,
        channels,
        run,
        *vectors.strides,
        eps,
        WIDTH=width,
        BLOCK_C=power_of_two(width),
        BLOCK_R=runs_at_once(width),
        **AFFINE_OPTIONS.kwargs(),
    )
    grid = (triton.cdiv(sites, config.block_s), blocks, rows)
    launcher(normalise_kernel)[grid](*source, y, affine, sites, *widths, SILU=silu, **tiles, **options)


def compilations() -> list[Compilation]:
    """Every specialisation that launches on real shapes make."""
    made = []
    for dtype in ("bf16", "fp16", "fp32"):
        for channels_last in (True, False):
            for second in (False, True):
                made.append(_image_compilation("statistics", dtype, channels_last, second, {}))
                made.append(_image_compilation("normalise", dtype, channels_last, second, {"SILU": True}))
            made.append(_image_compilation("normalise", dtype, channels_last, False, {"SILU": False}))
    for width in (4, 8, 10, 16, 20, 30, 40, 60, 80, 96):
        made.append(_affine_compilation("bf16", width))
    made += [_affine_compilation("bf16", 10, "pre_bias"), _affine_compilation("bf16", 10, "scale", "shift")]
    return [*made, _affine_compilation("fp16", 10), _affine_compilation("fp32", 10)]


def _image_compilation(
    name: str, dtype: str, channels_last: bool, second: bool, constants: dict[str, bool]
) -> Compilation:
    config = heuristic(2, 32, 10, 16384)
    assert isinstance(config, TwoPass)
    images = ["x"] + ["x2"] * second + ["y"] * (name == "normalise")
    floats, integers = (["affine"], []) if name == "normalise" else (["stats"], ["run"])
    integers = ["sites", "channels1", "channels2", *integers]
    layout = "channels-last" if channels_last else "contiguous"
    return Compilation(
        name=f"{name}, {dtype}, {layout}{', two images' * second}{', plain' * (constants.get('SILU') is False)}",
        kernel=normalise_kernel if name == "normalise" else statistics_kernel,
        signature={p: f"*{dtype}" for p in images} | dict.fromkeys(floats, "*fp32") | dict.fromkeys(integers, "i32"),
        constants=({} if second else {"x2": None})
        | {"CHANNELS_LAST": channels_last, "BLOCK_S": config.block_s, "BLOCK_C": config.block_c, **constants},
        options=config.options,
        divisible=frozenset({*images, *floats, *integers}),
    )


def _affine_compilation(dtype: str, width: int, *present: str) -> Compilation:
    absent = [name for name in ("pre_bias", "scale", "shift") if name not in present]
    pointers = ["weight", "bias", *present]
    integers = ["sites", "channels", "run", "pre_bias_stride", "scale_stride", "shift_stride"]
    return Compilation(
        name=" ".join(["affine,", f"{dtype}, {width} channels a group", *present]),
        kernel=affine_kernel,
        signature={"stats": "*fp32", "affine": "*fp32"}
        | {p: f"*{dtype}" for p in pointers}
        | dict.fromkeys(integers, "i32")
        | {"eps": "fp32"},
        constants=dict.fromkeys(absent)
        | {"WIDTH": width, "BLOCK_C": power_of_two(width), "BLOCK_R": runs_at_once(width)},
        options=AFFINE_OPTIONS,
        divisible=frozenset({"stats", "affine", *pointers, *integers}),
    )
