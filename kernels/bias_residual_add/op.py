"""The op `bias_residual_add` and its implementations."""

from ..device import has_triton
from ..op import Call, define
from .cases import CASES
from .reference import bias_residual_add as reference

bias_residual_add = define(rows=("x", "residual"), cases=CASES)(reference)

if has_triton():
    from ..launch import needs_cuda
    from .kernel import bias_residual_add as triton_bias_residual_add

    def _unsupported(call: Call) -> str | None:
        x, residual = call.tensors["x"], call.tensors["residual"]
        if residual != x:
            return f"residual must have the shape, dtype and layout of x, {x}, got {residual}"
        return needs_cuda(call)

    bias_residual_add.implement("triton", _unsupported)(triton_bias_residual_add)
