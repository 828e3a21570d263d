"""The op `add_layer_norm` and its implementations."""

from ..device import has_triton
from ..op import Call, define
from .cases import CASES
from .reference import add_layer_norm as reference

add_layer_norm = define(rows=("x", "residual"), cases=CASES)(reference)

if has_triton():
    from ..launch import needs_cuda
    from .config import MAX_COLUMNS
    from .kernel import add_layer_norm as triton_add_layer_norm

    def _unsupported(call: Call) -> str | None:
        x, residual = call.tensors["x"], call.tensors["residual"]
        if (x.shape, x.dtype) != (residual.shape, residual.dtype):
            return f"residual must have the shape and dtype of x, {x.shape} {x.dtype}, got {residual}"
        if x.shape[-1] > MAX_COLUMNS:
            return f"the last dimension is at most {MAX_COLUMNS}, got {x.shape[-1]}"
        return needs_cuda(call)

    add_layer_norm.implement("triton", _unsupported)(triton_add_layer_norm)
