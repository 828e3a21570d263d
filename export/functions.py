"""Ops kept as `stepfuse::` nodes, each with an ONNX function that says the same in standard ops.

Every runtime that knows ONNX functions inlines them; one that has a plugin of the same name and domain may use that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx.defs import OpSchema
from onnxscript import opset21, values

from ..engine.errors import RequestError, closest

op: Any = opset21  # its annotations describe graph values, not what is known while translating
DOMAIN = "stepfuse"
OLDEST = 21
"""Opset the functions need: GroupNormalization with a scale per channel."""

_GROUP_NORM_SILU = """GroupNormSiLU <num_groups, epsilon> (X, weight, bias) => (Y) {
    normed = GroupNormalization <num_groups: int = @num_groups, epsilon: float = @epsilon> (X, weight, bias)
    gate = Sigmoid(normed)
    Y = Mul(normed, gate)
}"""
_GEGLU = """GEGLU (X) => (Y) {
    a, b = Split <axis = -1, num_outputs = 2> (X)
    g = Gelu(b)
    Y = Mul(a, g)
}"""
_ATTENTION_23 = """Attention <scale> (Q, K, V) => (Y) {
    q = Transpose <perm = [0, 2, 1, 3]> (Q)
    k = Transpose <perm = [0, 2, 1, 3]> (K)
    v = Transpose <perm = [0, 2, 1, 3]> (V)
    mixed = Attention <scale: float = @scale> (q, k, v)
    Y = Transpose <perm = [0, 2, 1, 3]> (mixed)
}"""
_ATTENTION = """Attention <scale> (Q, K, V) => (Y) {
    q = Transpose <perm = [0, 2, 1, 3]> (Q)
    k = Transpose <perm = [0, 2, 3, 1]> (K)
    v = Transpose <perm = [0, 2, 1, 3]> (V)
    factor = Constant <value_float: float = @scale> ()
    typed = CastLike(factor, Q)
    scaled = Mul(q, typed)
    scores = MatMul(scaled, k)
    weights = Softmax <axis = -1> (scores)
    mixed = MatMul(weights, v)
    Y = Transpose <perm = [0, 2, 1, 3]> (mixed)
}"""


def translations(keep: Sequence[str], opset: int) -> dict[Any, Callable[..., Any]]:
    """Torch op -> translation, for the exporter. Raises RequestError for an op that cannot be kept."""
    for name in keep:
        if name not in KEPT:
            raise RequestError(f"--keep: got {name!r}; {closest(name, KEPT)}")
    if keep and opset < OLDEST:
        raise RequestError(f"--keep: its functions need opset {OLDEST} or newer, got {opset}; leave --keep out")
    return {getattr(torch.ops.stepfuse, name).default: KEPT[name] for name in keep}


def attach(model: ir.Model, keep: Sequence[str], opset: int) -> None:
    """Add the functions of the kept ops to a model."""
    bodies = {
        "group_norm_silu": _GROUP_NORM_SILU, "geglu": _GEGLU, "attention": _ATTENTION_23 if opset >= 23 else _ATTENTION
    }  # fmt: skip
    for name in keep:
        proto = onnx.parser.parse_function(f'<domain: "{DOMAIN}", opset_import: ["" : {opset}]> {bodies[name]}')
        function = ir.serde.deserialize_function(proto)
        model.functions[function.identifier()] = function
        model.opset_imports[DOMAIN] = 1


def _node(name: str, inputs: Sequence[str], attributes: dict[str, Any]) -> values.Op:
    parameters = [OpSchema.FormalParameter(each, "T") for each in inputs]
    schema = OpSchema(
        name, DOMAIN, 1, inputs=parameters, outputs=[OpSchema.FormalParameter("Y", "T")],
        type_constraints=[("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "")],
        attributes=[OpSchema.Attribute(key, kind, "") for key, kind in attributes.items()],
    )  # fmt: skip
    return values.Op(values.Opset(DOMAIN, 1), name, schema)


_INT, _FLOAT = OpSchema.AttrType.INT, OpSchema.AttrType.FLOAT
_group_norm_node = _node("GroupNormSiLU", ("X", "weight", "bias"), {"num_groups": _INT, "epsilon": _FLOAT})
_geglu_node = _node("GEGLU", ("X",), {})
_attention_node = _node("Attention", ("Q", "K", "V"), {"scale": _FLOAT})


def _group_norm_silu(
    x: Any, weight: Any, bias: Any, groups: int, eps: float, silu: bool = True, pre_bias: Any = None, scale: Any = None,
    shift: Any = None, x2: Any = None, partial_stats: Any = None,
) -> Any:  # fmt: skip
    assert partial_stats is None, "statistics are passed between fused ops only"
    sites = list(range(2, len(x.shape)))
    joined = x if x2 is None else op.Concat(x, x2, axis=1)
    if pre_bias is not None:
        joined = op.Add(joined, op.Unsqueeze(pre_bias, sites))
    if silu and scale is None and shift is None:
        return _group_norm_node(joined, weight, bias, num_groups=groups, epsilon=eps)
    y = op.GroupNormalization(joined, weight, bias, num_groups=groups, epsilon=eps)
    if scale is not None:
        y = op.Add(y, op.Mul(y, op.Unsqueeze(scale, sites)))
    if shift is not None:
        y = op.Add(y, op.Unsqueeze(shift, sites))
    return op.Mul(y, op.Sigmoid(y)) if silu else y


def _geglu(x: Any) -> Any:
    return _geglu_node(x)


def _attention(q: Any, k: Any, v: Any, kv_len: Any = None, bias: Any = None, scale: float | None = None) -> Any:
    assert kv_len is None, "exported graphs have prompts of one length"
    assert bias is None, "no network here adds to the scores"
    return _attention_node(q, k, v, scale=1 / math.sqrt(q.shape[-1]) if scale is None else scale)


KEPT: dict[str, Callable[..., Any]] = {"attention": _attention, "geglu": _geglu, "group_norm_silu": _group_norm_silu}
"""Ops that can be kept, the ones a TensorRT plugin would be written for, and their translations."""
