"""The op `layer_norm` and its implementations."""

from ..device import has_triton
from ..op import Call, define
from .cases import CASES
from .reference import layer_norm as reference

layer_norm = define(rows=("x",), cases=CASES)(reference)

if has_triton():
    from ..launch import needs_cuda
    from .config import MAX_COLUMNS
    from .kernel import layer_norm as triton_layer_norm

    def _unsupported(call: Call) -> str | None:
        columns = call.tensors["x"].shape[-1]
        if columns > MAX_COLUMNS:
            return f"the last dimension is at most {MAX_COLUMNS}, got {columns}"
        return needs_cuda(call)

    layer_norm.implement("triton", _unsupported)(triton_layer_norm)
