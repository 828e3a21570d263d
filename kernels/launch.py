"""How Triton kernels are launched and, without a GPU, compiled: the same constants in both cases."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch


@dataclass(frozen=True)
class Options:
    """Compiler options that every launch states, because their defaults change between Triton versions."""

    num_warps: int
    num_stages: int
    enable_fp_fusion: bool = True

    def kwargs(self) -> dict[str, Any]:
        """As keyword arguments of a launch."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": self.enable_fp_fusion}


@dataclass(frozen=True)
class Compilation:
    """One specialisation of a kernel that real launches make.

    signature: argument name -> Triton type ("*bf16", "i32", "fp32"), constexpr arguments left out; constants: values of
    the constexpr arguments; divisible: arguments whose value (or address) is a multiple of 16; targets: architectures
    that launch it ("sm_90", "gfx942"), empty for all.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    options: Options
    divisible: frozenset[str] = field(default_factory=frozenset)
    targets: frozenset[str] = field(default_factory=frozenset)


def launcher(kernel: Any) -> Any:
    """What to index with a grid: the kernel wrapped for torch.compile and packages, or bare under the interpreter."""
    from triton.runtime import JITFunction  # here, so that this module imports without Triton

    return torch.library.wrap_triton(kernel) if isinstance(kernel, JITFunction) else kernel


def triton_op(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: register a function that launches Triton kernels as `stepfuse::<name>_triton`, an op compilers see."""

    def register(launch: Callable[..., Any]) -> Callable[..., Any]:
        registered = torch.library.triton_op(f"stepfuse::{name}_triton", launch, mutates_args=())

        @wraps(launch)
        def call(*args: Any, **kwargs: Any) -> Any:
            return registered(*args, **kwargs)

        return call

    return register


def needs_cuda(call: Any) -> str | None:
    """Why no Triton kernel can run a call, or None: wrong device, gradients, a dtype the kernels do not take."""
    from triton import knobs

    if call.requires_grad:
        return "fused kernels are forward only, and an input requires a gradient"
    if call.device != "cuda" and not knobs.runtime.interpret:
        return f"Triton needs a CUDA device, the tensors are on {call.device}"
    floats = {t.dtype for t in call.tensors.values() if t.dtype.is_floating_point}
    if floats - {torch.float16, torch.bfloat16, torch.float32}:
        return f"dtypes are float16, bfloat16 and float32, got {floats}"
    return None
