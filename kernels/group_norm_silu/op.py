"""The op `group_norm_silu` and its implementations."""

from ..device import has_triton
from ..op import Call, define
from .cases import CASES
from .reference import group_norm_silu as reference

ROWS = ("x", "pre_bias", "scale", "shift", "x2", "partial_stats")
group_norm_silu = define(rows=ROWS, cases=CASES)(reference)

if has_triton():
    from ..launch import needs_cuda
    from .kernel import group_norm_silu as triton_group_norm_silu

    def _unsupported(call: Call) -> str | None:
        """Triton kernels take inputs of one dtype; weights may have another, statistics are float32."""
        dtype = call.tensors["x"].dtype
        for name in ("x2", "pre_bias", "scale", "shift"):
            if name in call.tensors and call.tensors[name].dtype != dtype:
                return f"{name} must have the dtype of x, {dtype}, got {call.tensors[name].dtype}"
        return needs_cuda(call)

    group_norm_silu.implement("triton", _unsupported)(triton_group_norm_silu)
