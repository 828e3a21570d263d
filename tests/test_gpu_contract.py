"""The contract of every implementation in the registry, on the device it is for: all cases, dtypes and layouts.

Runs where there is a GPU. `TRITON_INTERPRET=1 pytest -m gpu` runs the same code without one, on interpreted kernels.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from test_op_contract import has_rows, layouts, make, outputs

from stepfuse.benchmarks import gate
from stepfuse.kernels.op import REGISTRY, Case, Implementation, Op

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE.type == "cpu" and not INTERPRETED, reason="needs a CUDA device"),
]
ALL = [
    pytest.param(op, case, implementation, id=f"{op.name}-{implementation.name}-{case.name}")
    for op in REGISTRY.values()
    for implementation in op.implementations.values()
    if implementation.name != "reference"
    for case in op.cases
]
each = pytest.mark.parametrize(("op", "case", "implementation"), ALL)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@pytest.fixture(autouse=True)
def outputs_start_as_nan() -> Iterator[None]:
    """torch.empty fills with NaN: what a kernel does not write shows. TF32 is no float32."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def arguments_of(op: Op, case: Case, implementation: Implementation, dtype: torch.dtype) -> dict[str, object]:
    """The arguments of a case on the device; skips what the implementation refuses."""
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter (to 3.7.1) multiplies bfloat16 as the integers that hold it")
    made = {n: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for n, v in make(op, case).items()}
    given = {n: v.to(dtype) if has_dtype_of_model(op, n, v) else v for n, v in made.items()}
    if reason := implementation.unsupported(op.describe(**given)):
        pytest.skip(reason)
    return given


def has_dtype_of_model(op: Op, name: str, value: object) -> bool:
    """Whether an argument follows the model's dtype; statistics and the sampler's state stay float32."""
    floating = isinstance(value, torch.Tensor) and value.is_floating_point()
    state = op.name == "sampler_step" and name != "model_output"
    return floating and not state and name != "partial_stats"


def hold(op: Op, found: object, arguments: dict[str, object], why: str) -> None:
    """The tolerance rule against float64, and nothing unwritten."""
    verdict = gate.judge(outputs(found), outputs(op.reference(**arguments)), gate.truth(op.reference, arguments))
    assert verdict.green, f"{why}: error {verdict.error:.3g}, allowed {verdict.allowed:.3g}"


@each
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_agrees_with_float64_in_every_dtype(
    op: Op, case: Case, implementation: Implementation, dtype: torch.dtype
) -> None:
    arguments = arguments_of(op, case, implementation, dtype)
    found = outputs(implementation.call(**arguments))
    hold(op, found, arguments, "as given")
    for own, reference in zip(found, outputs(op.reference(**arguments)), strict=True):
        assert (own.shape, own.dtype, own.stride()) == (reference.shape, reference.dtype, reference.stride())
    for first, second in zip(found, outputs(implementation.call(**arguments)), strict=True):
        assert torch.equal(first, second), "two runs differ"


@each
def test_takes_every_layout_and_leaves_its_inputs_alone(op: Op, case: Case, implementation: Implementation) -> None:
    arguments = arguments_of(op, case, implementation, torch.float16)
    for name, value in arguments.items():
        if not isinstance(value, torch.Tensor):
            continue
        for label, other in on_device(layouts(value.cpu())).items():
            changed = arguments | {name: other}
            if implementation.unsupported(op.describe(**changed)):
                continue
            hold(op, implementation.call(**changed), changed, f"{name} {label}")
            assert torch.equal(other, value), f"{name} ({label}) was changed"


def on_device(made: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same strides and gaps on the device."""
    moved = {}
    for label, x in made.items():
        whole = torch.empty(x.untyped_storage().nbytes() // x.element_size(), dtype=x.dtype, device=DEVICE)
        moved[label] = whole.as_strided(x.shape, x.stride(), x.storage_offset()).copy_(x)
    return moved


@each
def test_rows_stand_alone_and_an_empty_batch_is_fine(op: Op, case: Case, implementation: Implementation) -> None:
    arguments = arguments_of(op, case, implementation, torch.float16)
    count = arguments[op.rows[0]].shape[0]  # type: ignore[union-attr]
    for rows in (slice(0, 1), slice(count - 1, count), slice(0, 0)):
        some = {n: v[rows] if n in op.rows and has_rows(v, count) else v for n, v in arguments.items()}
        found = outputs(implementation.call(**some))
        hold(op, found, some, f"rows {rows.start} to {rows.stop}")
        assert found[0].shape[0] == rows.stop - rows.start
