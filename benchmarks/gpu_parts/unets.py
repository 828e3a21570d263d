"""One guided U-Net evaluation of SDXL and SD 1.5, by diffusers: the baseline every ratio of ours is printed beside.

A straw man is no baseline: channels-last, fused q/k/v, cuDNN attention, Inductor, and a hand-made CUDA graph around
each. Weights are random, so the evaluation is checked first: finite, of a sane spread, and the error of each variant
against float32 recorded; what depends on trained weights (step caching, fp8 quality) is not measured here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...kernels.timing import time_call
from .session import Session, relative_error

CUDNN_FIRST = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)
SDXL = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD15 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
TINY = {
    "sample_size": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "cross_attention_dim": 16,
    "attention_head_dim": (1, 2),
    "layers_per_block": 1,
}
CASES = {"sdxl 1024^2 rows=2": (SDXL, 2), "sd15 512^2 rows=2": (SD15, 2), "sd15 512^2 rows=32": (SD15, 32)}
TINY_CASES = {"tiny rows=2": (TINY, 2)}


def run(session: Session) -> None:
    """eager, graph, graph with cuDNN attention, compiled + graph; each with a profile of where the time goes."""
    variants = ("eager", "graph", "graph+cudnn", "compile+graph+cudnn")
    if not session.tiny:  # on a CPU it is the same once more
        variants += ("compile+graph",)
    for case, (config, rows) in (TINY_CASES if session.tiny else CASES).items():
        _case(session, case, config, rows, variants)


def run_autotune(session: Session) -> None:
    """Inductor's max-autotune on SDXL, which takes minutes: last, with a hard stop."""
    for case, (config, rows) in list((TINY_CASES if session.tiny else CASES).items())[:1]:
        _case(session, case, config, rows, ("autotune+graph+cudnn",))


def _case(session: Session, case: str, config: dict[str, Any], rows: int, variants: tuple[str, ...]) -> None:
    keys = [f"{case} {variant}" for variant in variants]
    if all(key in session.finished for key in keys) or session.seconds_left() <= 0:
        return
    try:
        from diffusers import UNet2DConditionModel
    except ImportError as error:
        session.write(
            f"{case} skipped", error=f"diffusers cannot be imported ({error}); pass --wheels FOLDER with its wheel"
        )
        return
    with torch.device(session.device):
        unet: Any = UNet2DConditionModel(**config).eval().requires_grad_(False)
    inputs = _inputs(session, config, rows)
    with priority("cudnn" if session.cuda else ""):
        truth = unet(*inputs[0], **inputs[1]).sample
    unet.to(session.dtype).to(memory_format=torch.channels_last)
    unet.fuse_qkv_projections()
    args, kwargs = _cast(inputs, session.dtype)
    for key, variant in zip(keys, variants, strict=True):
        call = lambda v=variant: _measure(session, unet, args, kwargs, truth, v)  # noqa: E731
        if not session.measure(key, call):
            return


def _inputs(session: Session, config: dict[str, Any], rows: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    size = config["sample_size"]
    make: dict[str, Any] = {"device": session.device}
    latents = torch.randn(rows, 4, size, size, **make).to(memory_format=torch.channels_last)
    text = torch.randn(rows, 77, config["cross_attention_dim"], **make)
    extra: dict[str, Any] = {}
    if config.get("addition_embed_type") == "text_time":
        size_ids = torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]], **make).repeat(rows, 1)
        extra["added_cond_kwargs"] = {"text_embeds": torch.randn(rows, 1280, **make), "time_ids": size_ids}
    return (latents, torch.full((rows,), 500.0, **make), text), extra


def _cast(inputs: tuple[tuple[Any, ...], dict[str, Any]], dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args, extra = inputs
    added = {name: {k: t.to(dtype) for k, t in value.items()} for name, value in extra.items()}
    return tuple(t.to(dtype) for t in args), added


def priority(variant: str) -> Any:
    """cuDNN's attention first where the variant's name says so; torch's own order otherwise."""
    return sdpa_kernel(list(CUDNN_FIRST), set_priority=True) if "cudnn" in variant else nullcontext()


def _measure(
    session: Session, unet: Any, args: tuple[Any, ...], kwargs: dict[str, Any], truth: torch.Tensor, variant: str
) -> dict[str, Any]:
    model: Callable[..., Any] = unet
    torch._dynamo.reset()
    if "compile" in variant or "autotune" in variant:
        mode = "max-autotune-no-cudagraphs" if "autotune" in variant else None
        backend: dict[str, Any] = {"backend": "eager"} if session.tiny else {"mode": mode}
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        model = torch.compile(unet, fullgraph=True, dynamic=False, **backend)

    def evaluate() -> torch.Tensor:
        return model(*args, **kwargs, return_dict=False)[0]

    with priority(variant if session.cuda else ""):
        out = evaluate()
        spread = float(out.float().std())
        facts: dict[str, Any] = {"std": spread, "error_vs_float32": relative_error(out, truth)}
        if not bool(out.isfinite().all()) or not 0.01 < spread < 100:
            raise ValueError(f"the evaluation is not sane: std {spread}, finite {bool(out.isfinite().all())}")
        timing = time_call(evaluate, session.device, rounds=20, graph="graph" in variant, launches=1, budget_s=10.0)
        facts |= {"ms": 1e3 * timing.median_s, **timing.record()}
        if session.cuda:
            facts["profile"] = profile(evaluate)
            facts["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 2**30
    return facts


KINDS = {
    "attention": ("fmha", "flash", "attention", "sdpa"),
    "convolution": ("conv", "fprop", "implicit", "winograd", "dgrad"),
    "gemm": ("gemm", "cutlass", "nvjet", "cublas", "matmul", "splitk"),
    "norm": ("norm", "welford", "rowwisemoments"),
    "copy": ("copy", "memcpy", "memset", "cat", "nhwc", "nchw"),
}


def profile(call: Callable[[], object]) -> dict[str, Any]:
    """Shares of device time and launches by kind of kernel, over one call; quote times from unprofiled runs only."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        call()
        torch.cuda.synchronize()
    micros: Counter[str] = Counter()
    launches: Counter[str] = Counter()
    for event in trace.events() or ():
        if event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        kind = kind_of(event.name)
        micros[kind] += event.device_time
        launches[kind] += 1
    return {"us": dict(micros), "launches": dict(launches)}


def kind_of(kernel: str) -> str:
    """gemm, convolution, attention, norm, copy, or pointwise for everything else, from a kernel's name."""
    name = kernel.lower()
    return next((kind for kind, words in KINDS.items() if any(word in name for word in words)), "pointwise")
