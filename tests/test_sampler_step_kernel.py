"""The Triton kernel of `sampler_step`, interpreted, against its torch reference."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from stepfuse.kernels import sampler_step
from stepfuse.kernels.op import UnsupportedCallError
from stepfuse.kernels.policy import policy
from stepfuse.kernels.sampler_step.columns import Column
from stepfuse.kernels.sampler_step.kernel import compilations, dense, noise_bits
from stepfuse.kernels.sampler_step.reference import philox

pytestmark = pytest.mark.interpret
RTOL = 1e-6
EVERYTHING: dict[str, Any] = {
    "masked": True,
    "learned": True,
    "limited": True,
    "kept": (2, 1, 1, 2),
    "first": 1000,
    "shape": (4, 13, 11),
}
CASES = {
    "one block": {"shape": (4, 8, 8)},
    "several blocks": {"shape": (4, 17, 19)},
    "odd everything": {"rows": 3, "branches": 1, "shape": (3, 5, 7)},
    "three branches": {"branches": 3, "shape": (4, 6, 6)},
    "sixteen channels": {"shape": (16, 5, 4)},
    "one element": {"shape": (1, 1, 1)},
    "bfloat16 output": {"output": torch.bfloat16},
    "float16 output": {"output": torch.float16},
    "no noise": {"draws": 0},
    "this noise": {"draws": 1, "noise_stream": 3},
    "both noises": {"draws": 2, "noise_stream": 1},
    "noise given": {"extra": True},
    "interleaved output": {"interleaved": ("model_output",)},
    "all interleaved": {"interleaved": ("x", "base", "history", "model_output", "extra_noise"), "extra": True},
    "known image": {"masked": True},
    "known image, several blocks": {"masked": True, "shape": (4, 17, 19), "branches": 1},
    "known image, interleaved state": {"masked": True, "interleaved": ("x", "base", "known"), "shape": (3, 5, 7)},
    "learned variance": {"learned": True, "shape": (3, 9, 7)},
    "learned variance, interleaved": {"learned": True, "interleaved": ("model_output",), "output": torch.float16},
    "learned variance of given noise": {"learned": True, "extra": True, "branches": 3},
    "window": {"first": 40, "draws": 1, "shape": (4, 5, 5)},
    "model rows": {"kept": (2, 1, 2, 1), "output": torch.float16},
    "model rows, float32": {"kept": (1, 1, 2, 2), "shape": (3, 5, 7)},
    "model rows, bfloat16": {"kept": (2, 2, 1, 2), "output": torch.bfloat16, "shape": (4, 11, 13)},
    "model rows, interleaved": {"kept": (1, 2, 1, 1), "interleaved": ("model_output",), "output": torch.float16},
    "dynamic threshold": {"limited": True},
    "dynamic threshold, several blocks": {"limited": True, "shape": (3, 17, 19), "branches": 1, "draws": 0},
    "dynamic threshold, model rows": {"limited": True, "kept": (2, 1, 2, 1), "output": torch.float16, "first": 40},
    "everything, float16": {**EVERYTHING, "output": torch.float16},
    "everything, bfloat16": {**EVERYTHING, "output": torch.bfloat16, "shape": (16, 5, 4)},
    "everything, float32, three branches": {**EVERYTHING, "branches": 3, "kept": (3, 1, 2, 3)},
    "everything, interleaved": {**EVERYTHING, "interleaved": ("x", "base", "history", "model_output", "known")},
}


def arguments(
    rows: int = 4,
    branches: int = 2,
    shape: tuple[int, int, int] = (4, 6, 5),
    output: torch.dtype = torch.float32,
    extra: bool = False,
    interleaved: tuple[str, ...] = (),
    masked: bool = False,
    learned: bool = False,
    limited: bool = False,
    kept: tuple[int, ...] = (),
    first: int = 0,
    **options: int,
) -> dict[str, Any]:
    """A random call whose table uses every column; a third of the coefficients are 0, some rows have ended.

    kept: the branches that every row has in the network, [R, J] without gaps if empty; first: of the lines of row 0.
    """
    generator = torch.Generator().manual_seed(17)
    lines = 3

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    table = normal(rows, lines, len(Column)) * (torch.rand(rows, lines, len(Column), generator=generator) > 1 / 3)
    table[..., Column.LIVE] = 1.0
    table[..., Column.CLAMP] = normal(rows, lines).abs() + 0.5
    table[::2, :, Column.CLAMP] = math.inf
    made = {
        "x": normal(rows, *shape),
        "base": normal(rows, *shape),
        "history": normal(rows, 3, *shape),
        "model_output": normal(rows, branches, shape[0] * (1 + learned), *shape[1:]).to(output),
        "table": table,
        "update": torch.arange(rows) % (lines + 1),
        "weights": normal(rows, branches),
        "seeds": torch.randint(0, 2**62, (rows,), generator=generator),
        "extra_noise": normal(rows, 2, *shape) if extra else None,
    }
    if masked:
        made |= {"mask": torch.rand(rows, 1, *shape[1:], generator=generator), "known": normal(rows, 2, *shape)}
        table[..., Column.THRESHOLD] = table[..., Column.THRESHOLD].sign() * 0.4
        made["mask"][..., 0] = 1.0
    if learned:
        table[..., Column.V_LOG] *= torch.arange(rows).reshape(-1, 1) % 2  # the others take roots
        made["model_output"][:, :, shape[0] :] = made["model_output"][:, :, shape[0] :].abs()
    if limited:
        made["limit"] = torch.tensor([1.3, 0.0, 0.7, -1.0, math.nan, 2.1])[torch.arange(rows) % 6]
    if first:
        made["first_line"] = first + torch.arange(rows)
        made["update"] = made["update"] + made["first_line"]
    if kept:
        starts = [sum(kept[:row]) for row in range(rows)]
        indices = [[at + (j if j < n else 0) for j in range(branches)] for at, n in zip(starts, kept, strict=True)]
        made["model_rows"] = torch.tensor(indices)
        made["weights"] *= torch.arange(branches) < torch.tensor(kept).unsqueeze(1)
        made["model_output"] = torch.cat([made["model_output"][row, :n] for row, n in enumerate(kept)])
    for name in interleaved:
        made[name] = made[name].movedim(-3, -1).contiguous().movedim(-1, -3)
        assert math.prod(shape) == 1 or dense(made[name])[1]
    return made | options


def both(call: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    with policy({"sampler_step": "triton"}):
        found = sampler_step(**call)
    return list(zip(found, sampler_step.reference(**call), strict=True))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_equals_the_reference(case: dict[str, Any]) -> None:
    call = arguments(**case)
    copies = {name: value.clone() for name, value in call.items() if isinstance(value, Tensor)}
    for found, expected in both(call):
        assert found.stride() == expected.stride()
        assert found.dtype == expected.dtype
        if expected.dtype == torch.bool:
            assert torch.equal(found, expected)
        else:
            # the network's input is rounded to its dtype: where the two round apart, by one place
            rtol = max(RTOL, torch.finfo(found.dtype).eps) if found.dtype != torch.float32 else RTOL
            assert (found.double() - expected.double()).abs().max() <= rtol * expected.abs().max()
    for name, copy in copies.items():
        assert torch.equal(call[name], copy), f"{name} was changed"


@pytest.mark.parametrize("limited", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("extra", [True, False])
def test_without_drawn_noise_the_bits_are_those_of_the_reference(extra: bool, masked: bool, limited: bool) -> None:
    call = arguments(extra=extra, draws=2 if extra else 0, shape=(4, 9, 9), masked=masked, limited=limited)
    for found, expected in both(call):
        assert torch.equal(found, expected)


def test_rows_without_a_limit_have_the_bits_of_a_call_without() -> None:
    call = arguments(rows=6, draws=2, shape=(3, 9, 7), limited=True)
    call["update"] = torch.zeros(6, dtype=torch.int64)
    call["table"][..., [Column.P, Column.B]] = 1.0
    with policy({"sampler_step": "triton"}):
        limited, plain = sampler_step(**call), sampler_step(**{**call, "limit": None})
    for a, b in zip(limited, plain, strict=True):
        assert torch.equal(a[[1, 3, 4]], b[[1, 3, 4]])
    assert not any(torch.equal(limited[0][row], plain[0][row]) for row in (0, 2, 5))


def test_what_no_line_asks_for_changes_no_bits() -> None:
    plain = arguments(draws=2, shape=(4, 9, 9))
    new = [Column.KNOWN, Column.KNOWN_NOISE, Column.THRESHOLD, Column.V_LOG, Column.V_ROOT]
    plain["table"][..., new] = 0.0
    nan = torch.full_like(plain["model_output"], math.nan)
    more = {**plain, "model_output": torch.cat((plain["model_output"], nan), 2)}
    more |= {"mask": torch.full((4, 1, 9, 9), math.nan), "known": torch.full((4, 2, 4, 9, 9), math.nan)}
    more |= {"first_line": torch.full((4,), 70), "seeds": plain["seeds"]}
    with policy({"sampler_step": "triton"}):
        before = sampler_step(**{**plain, "draws": 0})
        after = sampler_step(**{**more, "update": plain["update"] + 70, "draws": 0})
        drawn = sampler_step(**plain)
        asked = sampler_step(**{**more, "first_line": None})
    for pairs in (zip(before, after, strict=True), zip(drawn, asked, strict=True)):
        for a, b in pairs:
            assert torch.equal(a, b)


def test_the_noise_of_a_window_counts_updates() -> None:
    call = arguments(first=5, draws=2)
    shifted = {**call, "first_line": call["first_line"] + 1, "update": call["update"] + 1}
    with policy({"sampler_step": "triton"}):
        assert not torch.equal(sampler_step(**call)[0], sampler_step(**shifted)[0])
        for a, b in zip(sampler_step(**call | {"draws": 0}), sampler_step(**shifted | {"draws": 0}), strict=True):
            assert torch.equal(a, b)


def test_noise_has_the_bits_of_the_reference() -> None:
    @triton.jit
    def bits(seed, update, out, stream, first, BLOCK: tl.constexpr):
        counters = first + tl.arange(0, BLOCK)
        four = noise_bits(tl.load(seed), counters, tl.load(update), stream)
        for lane in tl.static_range(4):
            tl.store(out + lane * BLOCK + tl.arange(0, BLOCK), four[lane].to(tl.int64))

    first, count = 2**20, 64
    counters = torch.arange(first, first + count)
    zero = torch.zeros_like(counters)
    for seed, update, stream in ((0, 0, 0), (2**62 - 7, 3, 1), (5 << 40, -1, 2), (2**63 - 1, 1000, 16), (-3, 1, 0)):
        at = torch.tensor(update)
        out = torch.empty(4, count, dtype=torch.int64)
        bits[(1,)](torch.tensor(seed), at, out, stream, first, BLOCK=count)
        expected = torch.stack(philox(torch.tensor(seed), counters, at, zero + stream, zero))
        assert torch.equal(out, expected)
        assert out.unique().numel() == out.numel()


def test_rows_that_have_ended_rest_and_read_no_nan() -> None:
    call = arguments(draws=2)
    call["table"][2, 1:] = 0.0
    call["update"] = torch.tensor([3, -1, 1, 10**9])
    call["model_output"][:] = math.nan
    call["x"][1, 0, 0, 0] = math.nan
    with policy({"sampler_step": "triton"}):
        x, base, history, model_input, bad = sampler_step(**call)
    for found, kept in ((x, "x"), (base, "base"), (history, "history"), (model_input, "x")):
        assert torch.equal(found.nan_to_num(99.0), call[kept].nan_to_num(99.0))
    assert not bad.any()


def test_zero_coefficients_read_nothing() -> None:
    call = arguments(branches=3, draws=2, extra=True)
    unused = [Column.G, Column.G2, Column.S, Column.SP, Column.SP2, Column.KEEP_BASE]
    unused += [Column(c + k) for c in (Column.C1, Column.C21) for k in range(3)]
    call["table"][..., unused] = 0.0
    call["weights"][:, 1] = 0.0
    call["update"] = torch.zeros(4, dtype=torch.int64)
    clean = both(call)
    for name in ("base", "extra_noise"):
        call[name].fill_(math.nan)
    call["history"][:, 2] = math.inf
    call["model_output"][:, 1] = math.nan
    call["table"][..., Column.PUSH] = 1.0
    for (found, expected), (before, _) in zip(both(call), clean, strict=True):
        assert torch.equal(found.isfinite(), expected.isfinite())
        if found.dim() == 4:
            assert torch.equal(found, before)
    assert not both(call)[4][0].any()


def test_only_rows_that_are_not_finite_are_reported() -> None:
    call = arguments(rows=5, draws=0, shape=(4, 12, 13))
    call["update"] = torch.zeros(5, dtype=torch.int64)
    call["table"][:, 0, Column.A] = 1.0
    call["x"][1, 3, 11, 12] = math.nan
    call["x"][4, 0, 0, 0] = -math.inf
    found, expected = both(call)[4]
    assert found.tolist() == expected.tolist() == [False, True, False, False, True]


def test_rows_do_not_depend_on_each_other() -> None:
    call = arguments(rows=4, shape=(4, 7, 7), draws=2)
    with policy({"sampler_step": "triton"}):
        whole = sampler_step(**call)
        for row in range(4):
            alone = {n: v[row : row + 1] if isinstance(v, Tensor) else v for n, v in call.items()}
            for one, many in zip(sampler_step(**alone), whole, strict=True):
                assert torch.equal(one[0], many[row])
        nothing = {n: v[:0] if isinstance(v, Tensor) else v for n, v in call.items()}
        assert [t.shape[0] for t in sampler_step(**nothing)] == [0] * 5


def test_other_layouts_are_copied_and_give_the_same() -> None:
    call = arguments(draws=0, masked=True, first=3, kept=(2, 2, 1, 2), limited=True)
    expected = [reference for _, reference in both(call)]
    names = ("x", "base", "history", "model_output", "table", "weights", "update", "seeds", "mask", "known")
    for name in (*names, "first_line", "model_rows", "limit"):
        value = call[name]
        wide = torch.full((*value.shape[:-1], 2 * value.shape[-1]), 7, dtype=value.dtype)
        wide[..., ::2] = value
        for (found, _), truth in zip(both(call | {name: wide[..., ::2]}), expected, strict=True):
            assert torch.equal(found, truth), name


def test_float64_is_refused_with_the_reason() -> None:
    call = arguments()
    call["x"] = call["x"].double()
    with pytest.raises(UnsupportedCallError, match="float64"), policy({"sampler_step": "triton"}):
        sampler_step(**call)
    call["x"] = call["x"].half()
    with pytest.raises(UnsupportedCallError, match=r"x is torch\.float16"), policy({"sampler_step": "triton"}):
        sampler_step(**call)


def test_float16_known_images_and_limits_are_refused_with_the_reason() -> None:
    call = arguments(masked=True)
    call["limit"] = torch.ones(4)
    for name in ("mask", "known", "limit"):
        with (
            pytest.raises(UnsupportedCallError, match=rf"{name} is torch\.float16"),
            policy({"sampler_step": "triton"}),
        ):
            sampler_step(**{**call, name: call[name].half()})
    with pytest.raises(ValueError, match="give mask and known"), policy({"sampler_step": "triton"}):
        sampler_step(**{**call, "known": None})


def test_compilations_give_every_argument() -> None:
    for compilation in compilations():
        names = set(compilation.signature) | set(compilation.constants)
        assert set(compilation.kernel.arg_names) == names
