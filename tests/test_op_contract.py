"""The contract of every op in the registry, on every case: reference against float64, layouts, rows, registration."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from stepfuse import kernels
from stepfuse.benchmarks import gate
from stepfuse.kernels.op import REGISTRY, Case, Implementation, Op, Spec

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
    """The same values in other memory: channels-last, heads first, sliced, permuted, misaligned."""
    wide = torch.zeros(*x.shape[:-1], x.shape[-1] + 3, dtype=x.dtype)
    wide[..., 1:-2] = x
    offset = torch.zeros(x.numel() + 1, dtype=x.dtype)
    offset[1:] = x.flatten()
    made = {
        "sliced": wide[..., 1:-2],
        "permuted": x.transpose(0, -1).contiguous().transpose(0, -1),
        "misaligned": offset[1:].view(x.shape),
    }
    if x.dim() >= 3:
        made["heads first"] = x.transpose(-3, -2).contiguous().transpose(-3, -2)
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


# Drawn shapes. What may vary is read off the cases: an extent is the same dimension wherever the case repeats it (rows
# apart), and it may take multiples of the smallest divisor of it at which the reference still accepts the arguments.

ROWS = "rows"
Sizes = Mapping[int | str, int]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FAR = {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}
"""Of max|truth|: what rounding of inputs, intermediate values and outputs can make in a dtype; about 10 to 170 ulps."""
EACH_OP = pytest.mark.parametrize("op", REGISTRY.values(), ids=REGISTRY)
DRAWN = settings(
    max_examples=20,
    derandomize=True,
    database=None,
    deadline=None,
    phases=(Phase.explicit, Phase.generate),  # without shrinking, a failure takes no longer than a success
    suppress_health_check=list(HealthCheck),
)


def resized(op: Op, case: Case, sizes: Sizes) -> Case:
    """The case with other sizes in place of its own."""
    made: dict[str, object] = {}
    count = extents(case.arguments[op.rows[0]])[0]
    for name, value in case.arguments.items():
        if shape := extents(value):
            by_row = name in op.rows and shape[0] == count
            keys = [ROWS if by_row and axis == 0 else extent for axis, extent in enumerate(shape)]
            shape = tuple(sizes.get(key, extent) for key, extent in zip(keys, shape, strict=True))
        made[name] = replace(value, shape=shape) if isinstance(value, Spec) else shape or value
    return Case(case.name, made)


def extents(value: object) -> tuple[int, ...]:
    return value.shape if isinstance(value, Spec) else value if isinstance(value, tuple) else ()


@cache
def units(op: Op, case_index: int) -> dict[int | str, int]:
    """Extents of a case that may vary, and the unit of which their sizes are multiples."""
    case = op.cases[case_index]
    found: dict[int | str, int] = {ROWS: 1}
    for extent in sorted({n for value in case.arguments.values() for n in extents(value)} - {1}):
        for unit in (n for n in (1, 2, 3, 4, 8, 16, 32) if extent % n == 0):
            if accepts(op, case, {extent: extent + unit}) and accepts(op, case, {extent: unit}):
                found[extent] = unit
                break
    return found


def accepts(op: Op, case: Case, sizes: Sizes) -> bool:
    try:
        op.reference(**on_meta(make(op, resized(op, case, sizes))))
    except (RuntimeError, ValueError, IndexError):
        return False
    return True


def on_meta(arguments: Mapping[str, object]) -> dict[str, object]:
    return {n: v.to("meta") if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}


@st.composite
def drawn_arguments(draw: st.DrawFn, op: Op, dtypes: tuple[torch.dtype, ...] = DTYPES) -> dict[str, object]:
    """Arguments of a case in drawn sizes (also no rows), of a drawn dtype, every tensor in a drawn layout."""
    index = draw(st.integers(0, len(op.cases) - 1))
    free = units(op, index)
    sizes = {key: unit * draw(st.integers(1, 9 if unit < 8 else 3)) for key, unit in free.items()}
    sizes[ROWS] = draw(st.integers(0, 3))
    case, dtype = op.cases[index], draw(st.sampled_from(dtypes))
    made = make(op, resized(op, case, sizes if accepts(op, case, sizes) else {ROWS: sizes[ROWS]}), torch.float64)
    for name, value in made.items():
        if isinstance(value, torch.Tensor):
            given = value.to(dtype_of(op, name, dtype)) if value.dtype == torch.float64 else value
            kinds = {"contiguous": given} | layouts(given)
            made[name] = kinds[draw(st.sampled_from(sorted(kinds)))]
    return made


def dtype_of(op: Op, name: str, dtype: torch.dtype) -> torch.dtype:
    """The sampler's state is float32, whatever the network's dtype."""
    return torch.float32 if op.name == "sampler_step" and name != "model_output" else dtype


def coarsest(arguments: Mapping[str, object]) -> torch.dtype:
    found = {v.dtype for v in arguments.values() if isinstance(v, torch.Tensor)}
    return next(dtype for dtype in reversed(DTYPES) if dtype in found)


@contextmanager
def memory_starts_as_nan() -> Iterator[None]:
    """torch.empty fills with NaN: what is not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def run_twice(implementation: Implementation, arguments: dict[str, object]) -> tuple[torch.Tensor, ...]:
    """Outputs, after: everything is written, a second run makes the same bits, no byte of the inputs has changed."""
    tensors = [v for v in arguments.values() if isinstance(v, torch.Tensor)]
    before = [bytes(t.untyped_storage()) for t in tensors]
    with memory_starts_as_nan():
        found, again = outputs(implementation.call(**arguments)), outputs(implementation.call(**arguments))
    for a, b in zip(found, again, strict=True):
        assert torch.isfinite(a).all(), "not every value was written"
        assert torch.equal(a, b), "two runs differ"
    assert [bytes(t.untyped_storage()) for t in tensors] == before, "an input was changed"
    return found


def assert_same_kind(found: tuple[torch.Tensor, ...], like: tuple[torch.Tensor, ...], op: Op | None = None) -> None:
    """Equal shapes, dtypes and strides. The kernel of the sampler's `op` writes contiguous state whatever it reads."""
    for a, b in zip(found, like, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert a.numel() == 0 or steps(a) == steps(b) or (op is REGISTRY["sampler_step"] and a.is_contiguous())


def steps(x: torch.Tensor) -> list[int]:
    """Strides along the dimensions that have more than one value: others address nothing."""
    return [step for step, extent in zip(x.stride(), x.shape, strict=True) if extent > 1]


def assert_rows_stand_alone(implementation: Implementation, op: Op, arguments: dict[str, object]) -> None:
    count, whole = arguments[op.rows[0]].shape[0], outputs(implementation.call(**arguments))  # type: ignore[union-attr]
    far = FAR[coarsest(arguments)]
    for row in range(count):
        alone = {n: v[row : row + 1] if n in op.rows and has_rows(v, count) else v for n, v in arguments.items()}
        for a, b in zip(outputs(implementation.call(**alone)), whole, strict=True):
            scale = max(1.0, float(b.double().abs().max()))
            torch.testing.assert_close(a[0], b[row], rtol=0, atol=far * scale)


@EACH_OP
def test_the_contract_holds_at_drawn_shapes_dtypes_and_layouts(op: Op) -> None:
    registered = getattr(torch.ops.stepfuse, op.name)

    @DRAWN
    @given(arguments=drawn_arguments(op))
    def holds(arguments: dict[str, object]) -> None:
        found = run_twice(op.implementations["reference"], arguments)
        torch.library.opcheck(registered, (), arguments, test_utils=("test_schema", "test_faketensor"))
        assert_same_kind(outputs(registered(**on_meta(arguments))), found)
        for a, truth in zip(found, gate.truth(op.reference, arguments), strict=True):
            if a.dtype == torch.bool:
                assert torch.equal(a, truth)
            elif a.numel():
                assert (a.double() - truth).abs().max() <= FAR[coarsest(arguments)] * max(1.0, truth.abs().max())
        assert_rows_stand_alone(op.implementations["reference"], op, arguments)

    holds()


@EACH_OP
def test_a_kernels_meta_is_the_references_at_drawn_shapes(op: Op) -> None:
    """What tracing sees of a Triton implementation, without a launch: shapes, dtypes and strides of the outputs."""
    (kernel,) = (made for made in op.implementations.values() if made.name == "triton")

    @DRAWN
    @given(arguments=drawn_arguments(op))
    def holds(arguments: dict[str, object]) -> None:
        if kernel.unsupported(replace(op.describe(**arguments), device="cuda")):
            return
        real = outputs(op.reference(**arguments))
        with FakeTensorMode() as mode:
            fake = {n: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}
            assert_same_kind(outputs(kernel.call(**fake)), real, op)

    holds()


@pytest.mark.interpret
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1, in its own process")
@EACH_OP
def test_a_kernel_keeps_the_contract_at_drawn_shapes(op: Op) -> None:
    (kernel,) = (made for made in op.implementations.values() if made.name == "triton")

    # Triton's interpreter (to 3.7.1) multiplies bfloat16 as the integers that hold it
    @settings(DRAWN, max_examples=8)
    @given(arguments=drawn_arguments(op, (torch.float32, torch.float16)))
    def holds(arguments: dict[str, object]) -> None:
        if kernel.unsupported(op.describe(**arguments)):
            return
        found, plain = run_twice(kernel, arguments), outputs(op.reference(**arguments))
        assert_same_kind(found, plain, op)
        verdict = gate.judge(found, plain, gate.truth(op.reference, arguments))
        assert verdict.green, verdict
        assert_rows_stand_alone(kernel, op, arguments)

    holds()
