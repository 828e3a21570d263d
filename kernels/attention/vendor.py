"""`attention` by libraries: the kernels behind torch's scaled dot product, xformers and flash-attn.

Torch's kernels are called as the aten operators they are, so that no process-wide switch chooses between them and
compilers see them. The Python libraries enter traces as one opaque operator each, and are imported on first use.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F

from ..device import sm
from ..op import Call
from .config import FLASH_HEAD_DIM

HALVES = (torch.float16, torch.bfloat16)
NO_LENGTHS = "it takes no key lengths (kv_len); use 'triton', 'vendor:flash_attn' or 'reference'"
NO_BIAS = "it takes no additive bias; use 'vendor:cudnn', 'vendor:efficient' or 'triton'"


def _refusal(call: Call, dtypes: tuple[torch.dtype, ...], multiple: int) -> str | None:
    """What all of them refuse: other devices, gradients, dtypes, head dims that are no multiple, no keys or queries."""
    q, k = call.tensors["q"], call.tensors["k"]
    if call.requires_grad:
        return "fused kernels are forward only, and an input requires a gradient"
    if call.device != "cuda":
        return f"it needs a CUDA device, the tensors are on {call.device}"
    if q.dtype not in dtypes:
        return f"dtypes are {', '.join(str(d).removeprefix('torch.') for d in dtypes)}, got {q.dtype}"
    if q.shape[-1] % multiple:
        return f"the head dim must be a multiple of {multiple}, got {q.shape[-1]}"
    if 0 in q.shape or 0 in k.shape:
        return f"a tensor is empty: q {q.shape}, k {k.shape}"
    return None


def _needs_sm(least: int) -> str | None:
    return f"it needs compute capability {least / 10}, the device has {sm() / 10}" if sm() < least else None


def _too_wide(call: Call, limit: int) -> str | None:
    dim = call.tensors["q"].shape[-1]
    return f"head dims are at most {limit} on this device, got {dim}" if dim > limit else None


def _has(call: Call, name: str) -> bool:
    return name in call.tensors


def cudnn_unsupported(call: Call) -> str | None:
    """Why cuDNN cannot run a call through torch, or None. Head dims to 256 on sm_90 only, 128 elsewhere."""
    if reason := _refusal(call, HALVES, 8) or _needs_sm(80) or _too_wide(call, 256 if sm() == 90 else 128):
        return reason
    if not torch.backends.cudnn.is_available():
        return "torch has no cuDNN here"
    if call.tensors["k"].shape[1] == 1:
        return "one key is too few for cuDNN"
    return NO_LENGTHS if _has(call, "kv_len") else None


def flash_unsupported(call: Call) -> str | None:
    """Why torch's flash kernel cannot run a call, or None."""
    if reason := _refusal(call, HALVES, 8) or _needs_sm(80) or _too_wide(call, FLASH_HEAD_DIM):
        return reason
    return NO_LENGTHS if _has(call, "kv_len") else NO_BIAS if _has(call, "bias") else None


def efficient_unsupported(call: Call) -> str | None:
    """Why torch's memory-efficient (CUTLASS) kernel cannot run a call, or None. It takes any width of head."""
    multiple = 4 if call.tensors["q"].dtype == torch.float32 else 8
    if reason := _refusal(call, (*HALVES, torch.float32), multiple) or _needs_sm(80):
        return reason
    return NO_LENGTHS if _has(call, "kv_len") else None


def xformers_unsupported(call: Call) -> str | None:
    """Why xformers cannot run a call, or None."""
    if find_spec("xformers") is None:
        return "xformers is not installed"
    return efficient_unsupported(call)


def flash_attn_unsupported(call: Call) -> str | None:
    """Why flash-attn 3 (Hopper) or 4 (Hopper and newer) cannot run a call, or None."""
    if flash_attn_version() is None:
        return "neither flash-attn 3 (flash_attn_interface) nor 4 (flash_attn.cute) is installed"
    if reason := _refusal(call, HALVES, 8) or _needs_sm(90) or _too_wide(call, 128 if sm() >= 100 else FLASH_HEAD_DIM):
        return reason
    if flash_attn_version() == 3 and sm() != 90:
        return f"flash-attn 3 needs compute capability 9.0, the device has {sm() / 10}"
    if sm() >= 120:
        return f"flash-attn 4 takes compute capabilities 9.0 to 11.0, the device has {sm() / 10}"
    return NO_BIAS if _has(call, "bias") else None


@cache
def flash_attn_version() -> int | None:
    """3 or 4, whichever is installed, 3 first; None without."""
    if find_spec("flash_attn_interface") is not None:
        return 3
    if find_spec("flash_attn") is not None and find_spec("flash_attn.cute") is not None:
        return 4
    return None


def _heads_first(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """[B, L, H, D] -> views [B, H, L, D]; copies only where the last stride is not 1."""
    return tuple((t if t.stride(-1) == 1 else t.contiguous()).transpose(1, 2) for t in tensors)


def _aligned(bias: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor | None:
    """The bias as [B, H, Lq, Lk] in q's dtype, rows 16 bytes apart or broadcast, which CUTLASS and cuDNN load by."""
    if bias is None:
        return None
    shape = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    wide = bias.to(q.dtype).expand(*bias.shape[:-1], shape[-1])
    return F.pad(wide, (0, -shape[-1] % 16))[..., : shape[-1]].expand(shape)


def cudnn(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_len: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Arguments as the reference, without kv_len."""
    out = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *_heads_first(q, k, v), _aligned(bias, q, k), False, 0.0, False, False, scale=scale
    )[0]
    return out.transpose(1, 2).contiguous()


def flash(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_len: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Arguments as the reference, without kv_len and bias."""
    out = torch.ops.aten._scaled_dot_product_flash_attention(*_heads_first(q, k, v), 0.0, False, False, scale=scale)[0]
    return out.transpose(1, 2).contiguous()


def efficient(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_len: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Arguments as the reference, without kv_len."""
    out = torch.ops.aten._scaled_dot_product_efficient_attention(
        *_heads_first(q, k, v), _aligned(bias, q, k), False, 0.0, False, scale=scale
    )[0]
    return out.transpose(1, 2).contiguous()


def _opaque(name: str) -> Callable[[Callable[..., torch.Tensor]], Callable[..., torch.Tensor]]:
    """Decorator: one operator `stepfuse::attention_<name>` for tracers, whose result is like a contiguous q."""

    def register(call: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        operator = torch.library.custom_op(f"stepfuse::attention_{name}", call, mutates_args=())
        operator.register_fake(lambda q, *_: torch.empty_like(q, memory_format=torch.contiguous_format))

        def attention(
            q: torch.Tensor,
            k: torch.Tensor,
            v: torch.Tensor,
            kv_len: torch.Tensor | None = None,
            bias: torch.Tensor | None = None,
            scale: float | None = None,
        ) -> torch.Tensor:
            return operator(q, k, v, kv_len, bias, scale)

        return attention

    return register


@_opaque("xformers")
def xformers(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_len: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: float | None,
) -> torch.Tensor:
    """Arguments as the reference, without kv_len."""
    library: Any = import_module("xformers.ops")
    return library.memory_efficient_attention(q, k, v, attn_bias=_aligned(bias, q, k), scale=scale).contiguous()


@_opaque("flash_attn")
def flash_attn(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_len: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: float | None,
) -> torch.Tensor:
    """Arguments as the reference, without bias."""
    library: Any = import_module("flash_attn_interface" if flash_attn_version() == 3 else "flash_attn.cute.interface")
    if flash_attn_version() == 4:
        out = library._flash_attn_fwd(q, k, v, seqused_k=kv_len, softmax_scale=scale)
    elif kv_len is None:
        out = library.flash_attn_func(q, k, v, softmax_scale=scale)
    else:
        out = library.flash_attn_with_kvcache(q, k, v, cache_seqlens=kv_len, softmax_scale=scale)
    return (out[0] if isinstance(out, tuple) else out).contiguous()
