"""The contract of every op in the registry, on every case: reference against float64, layouts, rows, registration."""

from __future__ import annotations

import zlib

import pytest
import torch

from stepfuse import kernels
from stepfuse.kernels.op import REGISTRY, Case, Op, Spec

for _name in kernels.__all__:
    getattr(kernels, _name)
ALL = [pytest.param(op, case, id=f"{op.name}-{case.name}") for op in REGISTRY.values() for case in op.cases]
each_case = pytest.mark.parametrize(("op", "case"), ALL)


def make(op: Op, case: Case, dtype: torch.dtype = torch.float32) -> dict[str, object]:
    """The arguments of a case: tensors are seeded by its name."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{op.name} {case.name}".encode()))
    made: dict[str, object] = {}
    for name, value in case.arguments.items():
        spec = Spec(value) if isinstance(value, tuple) else value
        if not isinstance(spec, Spec):
            made[name] = spec
        elif spec.dtype is not None:
            made[name] = torch.randint(spec.low, spec.high, spec.shape, generator=generator, dtype=spec.dtype)
        else:
            made[name] = torch.randn(spec.shape, generator=generator, dtype=torch.float64).to(dtype)
    return made


def outputs(result: object) -> tuple[torch.Tensor, ...]:
    """The tensors an op returned, as a tuple."""
    return result if isinstance(result, tuple) else (result,)  # type: ignore[return-value]


def layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same values in other memory: channels-last, a slice of something larger, permuted, misaligned."""
    wide = torch.zeros(*x.shape[:-1], x.shape[-1] + 3, dtype=x.dtype)
    wide[..., 1:-2] = x
    offset = torch.zeros(x.numel() + 1, dtype=x.dtype)
    offset[1:] = x.flatten()
    made = {
        "sliced": wide[..., 1:-2],
        "permuted": x.transpose(0, -1).contiguous().transpose(0, -1),
        "misaligned": offset[1:].view(x.shape),
    }
    if x.dim() == 4:
        made["channels-last"] = x.contiguous(memory_format=torch.channels_last)
    return made


@each_case
def test_float32_reference_agrees_with_float64(op: Op, case: Case) -> None:
    truth = outputs(op.reference(**make(op, case, torch.float64)))
    found = outputs(op.reference(**make(op, case)))
    for a, b in zip(found, truth, strict=True):
        if a.dtype == torch.bool:
            assert torch.equal(a, b)
        else:
            assert (a.double() - b).abs().max() <= 3e-5 * b.abs().max()


@each_case
def test_registered_op_is_the_reference(op: Op, case: Case) -> None:
    arguments = make(op, case)
    registered = getattr(torch.ops.stepfuse, op.name)
    for a, b in zip(outputs(registered(**arguments)), outputs(op.reference(**arguments)), strict=True):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()


@each_case
def test_registration_survives_opcheck_in_every_layout(op: Op, case: Case) -> None:
    arguments = make(op, case)
    first = next(name for name, value in arguments.items() if isinstance(value, torch.Tensor))
    tests = ("test_schema", "test_faketensor")
    for value in (arguments[first], *layouts(arguments[first]).values()):  # type: ignore[arg-type]
        torch.library.opcheck(getattr(torch.ops.stepfuse, op.name), (), arguments | {first: value}, test_utils=tests)


@each_case
def test_layout_of_the_input_does_not_change_values_or_the_input(op: Op, case: Case) -> None:
    arguments = make(op, case)
    truth = outputs(op.reference(**arguments))
    for name, value in arguments.items():
        if not isinstance(value, torch.Tensor):
            continue
        before = value.clone()
        for label, other in layouts(value).items():
            found = outputs(op.reference(**arguments | {name: other}))
            for a, b in zip(found, truth, strict=True):
                torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5, msg=f"{name} {label}")
            assert torch.equal(other, before), f"{name} ({label}) was changed"


@each_case
def test_rows_do_not_depend_on_each_other(op: Op, case: Case) -> None:
    arguments = make(op, case)
    count = arguments[op.rows[0]].shape[0]  # type: ignore[union-attr]
    whole = outputs(op.reference(**arguments))
    for row in range(count):
        alone = {
            name: value[row : row + 1] if name in op.rows and has_rows(value, count) else value
            for name, value in arguments.items()
        }
        for a, b in zip(outputs(op.reference(**alone)), whole, strict=True):
            torch.testing.assert_close(a[0], b[row], rtol=2e-5, atol=2e-5)


def has_rows(value: object, count: int) -> bool:
    """Whether the leading dimension is the rows (and not a broadcast one)."""
    return isinstance(value, torch.Tensor) and value.shape[0] == count


@each_case
def test_repeated_runs_are_bit_identical_and_an_empty_batch_is_fine(op: Op, case: Case) -> None:
    arguments = make(op, case)
    for a, b in zip(outputs(op.reference(**arguments)), outputs(op.reference(**arguments)), strict=True):
        assert torch.equal(a, b)
    count = arguments[op.rows[0]].shape[0]  # type: ignore[union-attr]
    empty = {n: v[:0] if n in op.rows and has_rows(v, count) else v for n, v in arguments.items()}
    for a, b in zip(outputs(op.reference(**empty)), outputs(op.reference(**arguments)), strict=True):
        assert a.shape == (0, *b.shape[1:])


@pytest.mark.parametrize("name", ["attention", "group_norm_silu", "layer_norm", "geglu"])
def test_registered_op_has_the_references_gradient(name: str) -> None:
    op = REGISTRY[name]
    arguments = make(op, op.cases[-1], torch.float64)
    leaves = {n: v.requires_grad_() for n, v in arguments.items() if isinstance(v, torch.Tensor)}
    outputs(getattr(torch.ops.stepfuse, name)(**arguments))[0].square().sum().backward()
    found = {n: v.grad.clone() for n, v in leaves.items() if v.grad is not None}
    for leaf in leaves.values():
        leaf.grad = None
    outputs(op.reference(**arguments))[0].square().sum().backward()
    assert found
    for n, grad in found.items():
        torch.testing.assert_close(grad, leaves[n].grad, rtol=1e-12, atol=1e-12)


def test_channels_last_stays_channels_last() -> None:
    op = REGISTRY["group_norm_silu"]
    x = torch.randn(2, 32, 5, 7).contiguous(memory_format=torch.channels_last)
    y = op.reference(x, torch.ones(32), torch.zeros(32), 8, 1e-5)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert op.reference(x.contiguous(), torch.ones(32), torch.zeros(32), 8, 1e-5).is_contiguous()
