"""The op `sampler_step` and its implementations."""

import torch

from ..device import has_triton
from ..op import Call, define
from .cases import CASES
from .reference import sampler_step as reference

_STATE = ("x", "base", "history", "extra_noise", "mask", "known")
_ROWS = (*_STATE, "model_output", "table", "update", "weights", "seeds", "model_rows", "first_line", "limit")

sampler_step = define(rows=_ROWS, cases=CASES)(reference)

if has_triton():
    from ..launch import needs_cuda
    from .kernel import sampler_step as triton_sampler_step

    def _unsupported(call: Call) -> str | None:
        if reason := needs_cuda(call):
            return reason
        for name in (*_STATE, "limit"):
            if name in call.tensors and call.tensors[name].dtype != torch.float32:
                return f"the state is float32 in the kernel, {name} is {call.tensors[name].dtype}"
        return None

    sampler_step.implement("triton", _unsupported)(triton_sampler_step)
