"""The Triton kernels of the norms under Triton's interpreter, held to the error of torch in the same dtype.

Every output and workspace starts as NaN between NaN guards, and inputs lie between NaN guards: a value not written, a
write or a read out of bounds all show.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from stepfuse.kernels import add_layer_norm, bias_residual_add, group_norm_silu, layer_norm
from stepfuse.kernels.add_layer_norm import kernel as add_layer_norm_kernel
from stepfuse.kernels.bias_residual_add import config as bias_residual_add_config
from stepfuse.kernels.bias_residual_add import kernel as bias_residual_add_kernel
from stepfuse.kernels.group_norm_silu import config as group_norm_config
from stepfuse.kernels.group_norm_silu import kernel as group_norm_kernel
from stepfuse.kernels.group_norm_silu.two_pass import runs_at_once
from stepfuse.kernels.layer_norm import kernel as layer_norm_kernel
from stepfuse.kernels.moments import tile_offsets, tile_start
from stepfuse.kernels.statistics import partial_statistics, run_count

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.interpret,
    pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1 (Triton's interpreter, own process)"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp"),  # in lanes that are masked out
]
GUARD = 64
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
PASSES = ("one pass", "two passes")
each_pass = pytest.mark.parametrize("passes", PASSES)


def between_guards(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format) -> tuple[Tensor, Tensor]:
    """A tensor of NaN in the middle of a buffer of NaN, and the buffer."""
    count = torch.Size(shape).numel()
    buffer = torch.full((count + 2 * GUARD,), float("nan"), dtype=dtype)
    inner = buffer[GUARD : GUARD + count]
    if layout == torch.channels_last:
        b, c, h, w = shape
        return inner.view(b, h, w, c).permute(0, 3, 1, 2), buffer
    return inner.view(shape), buffer


@pytest.fixture(autouse=True)
def guarded_outputs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.empty gives NaN between guards; the guards are looked at in the end."""
    buffers: list[Tensor] = []

    def empty(
        shape: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
        device: object = None,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> Tensor:
        made, buffer = between_guards(tuple(shape), dtype, memory_format)
        buffers.append(buffer)
        return made

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        yield
    assert buffers, "the kernel allocated nothing through torch.empty"
    for buffer in buffers:
        assert buffer[:GUARD].isnan().all(), "written before the start"
        assert buffer[-GUARD:].isnan().all(), "written past the end"


@pytest.fixture(autouse=True)
def bfloat16_rounds_to_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter truncates float32 to bfloat16, which costs a bit; compiled kernels and torch round to nearest."""
    if not INTERPRETED:
        return
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(values: np.ndarray, source: object, target: object, mode: object) -> np.ndarray:
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(values, source, target, mode)
        bits = np.ascontiguousarray(values).view(np.uint32)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(values), np.uint16(0x7FC0), nearest)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)


def normal(
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    layout: torch.memory_format = torch.contiguous_format,
    mean: float = 0.0,
) -> Tensor:
    """Normal values of a seed of its own, between guards."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {shape}".encode()))
    made, _ = between_guards(shape, dtype, layout if len(shape) == 4 else torch.contiguous_format)
    return made.copy_(torch.randn(shape, generator=generator, dtype=torch.float64) + mean)


def upcast(arguments: dict[str, object]) -> dict[str, object]:
    """The same arguments in float64."""
    return {k: v.double() if isinstance(v, Tensor) else v for k, v in arguments.items()}


def outputs(result: object) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)  # type: ignore[return-value]


def hold_to_the_reference(
    op: object, launch: Callable[..., Any], arguments: dict[str, object], floor: tuple[float, ...] = (1e-7, 1e-7)
) -> None:
    """Error of the kernel at most twice that of torch in the same dtype; layout, dtype and shape of the reference.

    floor: for each output, the part of the largest value by which the kernel may be off in any case.
    """
    truth = outputs(op.reference(**upcast(arguments)))
    # torch's channels-last group norm on CPU takes E[x^2] - E[x]^2; its contiguous one is the yardstick
    plain = {k: v.contiguous() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    reference = outputs(op.reference(**plain))
    layouts = [out.stride() for out in outputs(op.reference(**arguments))]
    found = outputs(launch(**arguments))
    assert [out.stride() for out in found] == layouts
    for own, torchs, exact, least in zip(found, reference, truth, floor[: len(truth)], strict=True):
        assert (own.shape, own.dtype) == (torchs.shape, torchs.dtype)
        assert not own.isnan().any()
        allowed = 2 * (torchs.double() - exact).abs().max() + least * exact.abs().max()
        assert (own.double() - exact).abs().max() <= allowed


def group_norm_arguments(
    shape: tuple[int, ...],
    groups: int,
    dtype: torch.dtype,
    layout: torch.memory_format = torch.contiguous_format,
    extra_channels: int = 0,
    mean: float = 0.0,
    pre_bias: int = 0,
    modulated: bool = False,
    silu: bool = True,
) -> dict[str, object]:
    """pre_bias: number of its rows."""
    rows, c = shape[0], shape[1] + extra_channels
    made: dict[str, object] = {
        "x": normal("x", shape, dtype, layout, mean),
        "weight": normal("weight", (c,), dtype),
        "bias": normal("bias", (c,), dtype),
        "groups": groups,
        "eps": 1e-5,
        "silu": silu,
    }
    if extra_channels:
        made["x2"] = normal("x2", (rows, extra_channels, *shape[2:]), dtype, layout, mean)
    if pre_bias:
        made["pre_bias"] = normal("pre_bias", (pre_bias, c), dtype)
    if modulated:
        made["scale"], made["shift"] = normal("scale", (rows, c), dtype), normal("shift", (rows, c), dtype)
    return made


def group_norm_launch(passes: str, **options: object) -> Callable[..., Any]:
    kind = group_norm_config.OnePass if passes == "one pass" else group_norm_config.TwoPass
    return partial(group_norm_kernel.launch, kind(**options))


GROUP_NORMS = {
    "4 channels a group, odd area": {"shape": (2, 16, 13, 11), "groups": 4},
    "10 channels a group": {"shape": (2, 40, 8, 8), "groups": 4},
    "40 channels a group, 1280": {"shape": (1, 160, 4, 4), "groups": 4},
    "60 channels a group, over the seam": {"shape": (1, 80, 4, 5), "groups": 2, "extra_channels": 40},
    "30 channels a group, seam inside a group": {"shape": (2, 40, 3, 7), "groups": 2, "extra_channels": 20},
    "embedding per row, scale and shift": {"shape": (3, 24, 5, 5), "groups": 3, "pre_bias": 3, "modulated": True},
    "embedding for all rows": {"shape": (2, 24, 5, 5), "groups": 3, "pre_bias": 1},
    "no SiLU": {"shape": (2, 24, 9, 15), "groups": 3, "silu": False},
    "odd number of odd groups": {"shape": (2, 35, 3, 3), "groups": 5},
    "one group, one site": {"shape": (2, 6, 1, 1), "groups": 1},
    "tokens": {"shape": (2, 24, 70), "groups": 3, "silu": False},
}
each_group_norm = pytest.mark.parametrize("case", GROUP_NORMS.values(), ids=GROUP_NORMS)


@each_group_norm
@each_layout
@each_pass
def test_group_norm(case: dict[str, object], layout: torch.memory_format, passes: str) -> None:
    arguments = group_norm_arguments(**case, dtype=torch.float32, layout=layout)
    hold_to_the_reference(group_norm_silu, group_norm_launch(passes), arguments)


@each_dtype
@each_pass
@pytest.mark.parametrize("mean", [0.0, 1e3], ids=["centred", "mean of 1000"])
def test_group_norm_in_every_dtype_and_far_from_zero(dtype: torch.dtype, passes: str, mean: float) -> None:
    case = GROUP_NORMS["30 channels a group, seam inside a group"] | {"pre_bias": 2, "mean": mean}
    arguments = group_norm_arguments(**case, dtype=dtype, layout=torch.channels_last)
    hold_to_the_reference(group_norm_silu, group_norm_launch(passes), arguments)


@each_pass
def test_what_rounding_left_of_the_mean_is_taken_off(passes: str) -> None:
    """Half the last digit of the mean is 5e-4 here, half of that of a sum of means several times as much."""
    arguments = group_norm_arguments((1, 64, 16, 16), 2, torch.float32, torch.channels_last, mean=1e4, silu=False)
    exact = group_norm_silu.reference(**upcast(arguments))
    error = (group_norm_launch(passes)(**arguments) - exact).abs().max()
    assert error <= {"one pass": 1e-5, "two passes": 1e-3}[passes]


def test_addresses_past_two_to_the_31() -> None:
    @triton.jit
    def kernel(out, b, site, c, sites, channels, LAST: tl.constexpr):
        start = tile_start(b.to(tl.int64), site.to(tl.int64), c, sites, channels, LAST)
        tl.store(
            out + tl.arange(0, 2), (start + tile_offsets(3, tl.arange(0, 2) + 62, sites, channels, LAST)).to(tl.float64)
        )

    sites, channels, b, site, c = 3 << 24, 192, 2, 1 << 25, 64
    for last in (True, False):
        found = torch.empty((2,), dtype=torch.float64)  # holds integers up to 2^53
        kernel[(1,)](found, b, site, c, sites, channels, last)
        for i, address in enumerate(found.tolist()):
            s, k = site + 3, c + 62 + i
            assert address == ((b * sites + s) * channels + k if last else (b * channels + k) * sites + s) > 2**33


@each_pass
def test_group_norm_with_an_outlier_first(passes: str) -> None:
    """Sums shifted by the first value would lose the variance here."""
    arguments = group_norm_arguments((1, 8, 16, 16), 2, torch.float32, torch.channels_last, mean=100.0)
    arguments["x"][:, :, 0, 0] = -3e4
    hold_to_the_reference(group_norm_silu, group_norm_launch(passes), arguments)


@each_layout
@pytest.mark.parametrize(("block_s", "block_c"), [(16, 32), (64, 64)])
def test_two_passes_over_several_runs_and_blocks(layout: torch.memory_format, block_s: int, block_c: int) -> None:
    arguments = group_norm_arguments((2, 50, 11, 13), 6, torch.bfloat16, layout, extra_channels=22, pre_bias=2)
    assert run_count(11 * 13) == 3
    hold_to_the_reference(group_norm_silu, group_norm_launch("two", block_s=block_s, block_c=block_c), arguments)


def test_more_runs_than_one_tile_of_statistics_holds() -> None:
    arguments = group_norm_arguments((1, 132, 24, 32), 2, torch.float32, mean=10.0)
    assert run_count(24 * 32) > runs_at_once(66)
    hold_to_the_reference(group_norm_silu, group_norm_launch("two", block_c=128), arguments)


@each_layout
@pytest.mark.parametrize("group_set", [1, 2, 4])
def test_one_pass_with_sets_of_groups(layout: torch.memory_format, group_set: int) -> None:
    arguments = group_norm_arguments((2, 30, 6, 5), 5, torch.float16, layout, pre_bias=2, modulated=True)
    hold_to_the_reference(group_norm_silu, group_norm_launch("one pass", group_set=group_set), arguments)


@each_dtype
@each_layout
@pytest.mark.parametrize("pre_bias", [0, 1, 2])
def test_group_norm_from_the_statistics_of_both_images(
    dtype: torch.dtype, layout: torch.memory_format, pre_bias: int
) -> None:
    case = GROUP_NORMS["30 channels a group, seam inside a group"] | {"shape": (2, 40, 9, 9), "pre_bias": pre_bias}
    arguments = group_norm_arguments(**case, dtype=dtype, layout=layout)
    statistics = [partial_statistics(arguments[name]) for name in ("x", "x2")]
    arguments["partial_stats"] = torch.cat(statistics, -1)
    hold_to_the_reference(group_norm_silu, group_norm_launch("two"), arguments)


def test_given_statistics_are_the_ones_used() -> None:
    arguments = group_norm_arguments((2, 24, 5, 5), 3, torch.float32)
    given = partial_statistics(arguments["x"])
    given[:, :, 1] *= 4  # four times the variance inside every channel
    changed = group_norm_launch("two")(**arguments, partial_stats=given)
    assert not torch.allclose(changed, group_norm_launch("two")(**arguments), atol=0.1)
    hold_to_the_reference(group_norm_silu, group_norm_launch("two"), arguments | {"partial_stats": given})
    with pytest.raises(ValueError, match=r"expected .* \(2, 1, 2, 24\)"):
        group_norm_launch("two")(**arguments, partial_stats=given[:, :, :, :12])


def test_group_norm_takes_slices_of_a_wider_projection() -> None:
    arguments = group_norm_arguments((3, 24, 5, 5), 3, torch.float32)
    wide = normal("wide", (3, 100), torch.float32)
    arguments |= {"pre_bias": wide[:, 3:27], "scale": wide[:, 30:54], "shift": wide[:, 76:]}
    for passes in PASSES:
        hold_to_the_reference(group_norm_silu, group_norm_launch(passes), arguments)


@pytest.mark.parametrize("case", ["sliced", "permuted", "empty"])
def test_group_norm_op_on_other_memory(case: str) -> None:
    arguments = group_norm_arguments((2, 24, 6, 6), 3, torch.float32)
    x = arguments["x"]
    other = {"sliced": x[..., 1:4], "permuted": x.transpose(0, 3).contiguous().transpose(0, 3), "empty": x[:0]}[case]
    triton_call = group_norm_silu.implementations["triton"].call
    if case == "empty":
        assert triton_call(**arguments | {"x": other}).shape == other.shape
    else:
        hold_to_the_reference(group_norm_silu, triton_call, arguments | {"x": other})


@each_pass
def test_rows_of_a_group_norm_do_not_depend_on_each_other(passes: str) -> None:
    arguments = group_norm_arguments((3, 24, 9, 10), 3, torch.bfloat16, torch.channels_last, 12, pre_bias=3)
    launch = group_norm_launch(passes)
    whole = launch(**arguments)
    for row in range(3):
        alone = {k: v[row : row + 1] if k in {"x", "x2", "pre_bias"} else v for k, v in arguments.items()}
        assert torch.equal(launch(**alone)[0], whole[row])


SUMS = {
    "320 channels": {"shape": (1, 320, 6, 6)},
    "three runs, the last short": {"shape": (2, 24, 11, 13)},
    "odd channels": {"shape": (2, 17, 3, 5)},
    "one site": {"shape": (2, 70, 1, 1)},
    "no bias": {"shape": (2, 24, 8, 9), "bias": False},
    "tokens": {"shape": (2, 24, 70)},
    "mean of 1000": {"shape": (2, 24, 8, 9), "mean": 1e3},
    "one wide row": {"shape": (1, 130, 2, 5)},
}
each_sum = pytest.mark.parametrize("case", SUMS.values(), ids=SUMS)


def sum_arguments(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    layout: torch.memory_format = torch.contiguous_format,
    bias: bool = True,
    mean: float = 0.0,
) -> dict[str, object]:
    return {
        "x": normal("x", shape, dtype, layout, mean),
        "bias": normal("bias", shape[1:2], dtype) if bias else None,
        "residual": normal("residual", shape, dtype, layout),
    }


def sum_launch(**options: int) -> Callable[..., Any]:
    return partial(bias_residual_add_kernel.launch, bias_residual_add_config.Config(**options))


@each_sum
@each_layout
def test_bias_residual_add(case: dict[str, object], layout: torch.memory_format) -> None:
    arguments = sum_arguments(**case, dtype=torch.float32, layout=layout)
    floor = (1e-7, 4e-7)  # the interpreter adds 64 lanes one after another, where a GPU adds in pairs
    hold_to_the_reference(bias_residual_add, sum_launch(), arguments, floor)
    hold_to_the_reference(bias_residual_add, sum_launch(block_s=16, block_c=32), arguments, floor)


@each_dtype
@each_layout
def test_statistics_of_the_sum_are_those_of_what_was_stored(dtype: torch.dtype, layout: torch.memory_format) -> None:
    arguments = sum_arguments((2, 24, 11, 13), dtype, layout)
    y, statistics = sum_launch()(**arguments)
    exact, reference = partial_statistics(y.double()), partial_statistics(y)
    assert statistics.shape == (2, 3, 2, 24)
    for i in range(2):  # means and squared deviations differ in size: held apart
        allowed = 2 * (reference[:, :, i] - exact[:, :, i]).abs().max() + 1e-7 * exact[:, :, i].abs().max()
        assert (statistics[:, :, i] - exact[:, :, i]).abs().max() <= allowed
    truth = bias_residual_add.reference(**upcast(arguments))[0]
    torchs = bias_residual_add.reference(**arguments)[0]
    assert (y.double() - truth).abs().max() <= 2 * (torchs.double() - truth).abs().max() + 1e-7 * truth.abs().max()


@each_layout
def test_a_sum_and_the_norm_after_it_agree_with_torch(layout: torch.memory_format) -> None:
    y, statistics = sum_launch()(**sum_arguments((2, 24, 11, 13), torch.bfloat16, layout))
    arguments = group_norm_arguments((2, 24, 11, 13), 3, torch.bfloat16, layout) | {"x": y}
    with_statistics = partial(group_norm_launch("two"), partial_stats=statistics)
    hold_to_the_reference(group_norm_silu, with_statistics, arguments)


def test_rows_of_a_sum_do_not_depend_on_each_other() -> None:
    arguments = sum_arguments((3, 24, 9, 10), torch.bfloat16, torch.channels_last)
    whole = sum_launch()(**arguments)
    for row in range(3):
        alone = {k: v[row : row + 1] if k in {"x", "residual"} else v for k, v in arguments.items()}
        for a, b in zip(sum_launch()(**alone), whole, strict=True):
            assert torch.equal(a[0], b[row])
    empty = bias_residual_add.implementations["triton"].call(
        **{k: v[:0] if k in {"x", "residual"} else v for k, v in arguments.items()}
    )
    assert [tuple(t.shape) for t in empty] == [(0, 24, 9, 10), (0, 2, 2, 24)]


ROWS = {
    "320 columns": {"shape": (2, 9, 320)},
    "1280 columns": {"shape": (2, 3, 1280)},
    "odd columns": {"shape": (3, 5, 17)},
    "one column": {"shape": (4, 1)},
    "no affine part": {"shape": (2, 9, 72), "weight": False, "bias": False},
    "no bias": {"shape": (2, 9, 72), "bias": False},
    "mean of 1000": {"shape": (2, 9, 640), "mean": 1e3},
    "one row": {"shape": (768,)},
}
each_rows = pytest.mark.parametrize("case", ROWS.values(), ids=ROWS)


def row_arguments(
    shape: tuple[int, ...], dtype: torch.dtype, weight: bool = True, bias: bool = True, mean: float = 0.0
) -> dict[str, object]:
    return {
        "x": normal("x", shape, dtype, mean=mean),
        "weight": normal("weight", shape[-1:], dtype) if weight else None,
        "bias": normal("bias", shape[-1:], dtype) if bias else None,
        "eps": 1e-5,
    }


def row_launch(kernel: object, columns: int, block_m: int) -> Callable[..., Any]:
    config = layer_norm_kernel.Config(block_m, 1 << max(columns - 1, 1).bit_length())
    return partial(kernel.launch, config)


@each_rows
@each_dtype
@pytest.mark.parametrize("block_m", [1, 4])
def test_layer_norm(case: dict[str, object], dtype: torch.dtype, block_m: int) -> None:
    arguments = row_arguments(**case, dtype=dtype)
    hold_to_the_reference(layer_norm, row_launch(layer_norm_kernel, case["shape"][-1], block_m), arguments)


@each_rows
@each_dtype
@pytest.mark.parametrize("block_m", [1, 4])
def test_add_layer_norm(case: dict[str, object], dtype: torch.dtype, block_m: int) -> None:
    arguments = row_arguments(**case, dtype=dtype) | {"residual": normal("residual", case["shape"], dtype)}
    hold_to_the_reference(add_layer_norm, row_launch(add_layer_norm_kernel, case["shape"][-1], block_m), arguments)


def test_rows_of_layer_norms_do_not_depend_on_each_other() -> None:
    arguments = row_arguments((7, 320), torch.bfloat16)
    residual = normal("residual", (7, 320), torch.bfloat16)
    plain, added = row_launch(layer_norm_kernel, 320, 4), row_launch(add_layer_norm_kernel, 320, 4)
    whole, both = plain(**arguments), added(**arguments, residual=residual)
    for row in range(7):
        alone = arguments | {"x": arguments["x"][row : row + 1]}
        assert torch.equal(plain(**alone)[0], whole[row])
        for a, b in zip(added(**alone, residual=residual[row : row + 1]), both, strict=True):
            assert torch.equal(a[0], b[row])


def test_the_sum_is_normalised_as_it_is_returned() -> None:
    arguments = row_arguments((16, 320), torch.bfloat16)
    y, total = row_launch(add_layer_norm_kernel, 320, 4)(**arguments, residual=normal("r", (16, 320), torch.bfloat16))
    assert torch.equal(y, row_launch(layer_norm_kernel, 320, 4)(**arguments | {"x": total}))


def test_layer_norm_ops_on_other_memory_and_no_rows() -> None:
    arguments = row_arguments((6, 40), torch.float32)
    wide = normal("wide", (6, 50), torch.float32)
    for op, extra in ((layer_norm, {}), (add_layer_norm, {"residual": wide[:, 10:]})):
        triton_call = op.implementations["triton"].call
        hold_to_the_reference(op, triton_call, arguments | {"x": wide[:, :40]} | extra)
        none = {k: v[:0] for k, v in extra.items()}
        for out in outputs(triton_call(**arguments | {"x": wide[:0, :40]} | none)):
            assert out.shape == (0, 40)
