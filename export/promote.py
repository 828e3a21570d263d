"""Translations of `concat` and `stack`: like torch, they bring their tensors to one dtype.

The exporter's own type promotion knows `cat` alone; of the other two it makes a Concat of several types, which is no
valid ONNX. `stack` comes from the history of `sampler_step`, `concat` from foreign modules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset18

op: Any = opset18  # its annotations describe graph values, not what is known while translating
_ORDER = (
    ir.DataType.BOOL,
    ir.DataType.UINT8,
    ir.DataType.INT8,
    ir.DataType.INT32,
    ir.DataType.INT64,
    ir.DataType.FLOAT16,
    ir.DataType.BFLOAT16,
    ir.DataType.FLOAT,
    ir.DataType.DOUBLE,
)


def concat(tensors: Sequence[Any], dim: int = 0) -> Any:
    """torch.concat."""
    return op.Concat(*promoted(tensors), axis=dim)


def stack(tensors: Sequence[Any], dim: int = 0) -> Any:
    """torch.stack."""
    return op.Concat(*[op.Unsqueeze(tensor, [dim]) for tensor in promoted(tensors)], axis=dim)


def promoted(tensors: Sequence[Any]) -> list[Any]:
    """The tensors in the dtype torch would promote them to; float16 with bfloat16 gives float32."""
    found = {tensor.dtype for tensor in tensors}
    if len(found) <= 1:
        return list(tensors)
    both_halves = {ir.DataType.FLOAT16, ir.DataType.BFLOAT16} <= found
    target = ir.DataType.FLOAT if both_halves and max(found, key=_ORDER.index) != ir.DataType.DOUBLE else None
    target = target or max(found, key=_ORDER.index)
    return [tensor if tensor.dtype == target else op.Cast(tensor, to=int(target)) for tensor in tensors]


TABLE: dict[Any, Callable[..., Any]] = {torch.ops.aten.concat.default: concat, torch.ops.aten.stack.default: stack}
