"""Every distinct convolution of the U-Nets, channels-last, in bf16 and fp16.

Variants: with and without bias; cuDNN's own choice against its benchmark; a 1x1 convolution as a matrix product;
nearest upsampling followed by a 3x3 convolution, folded into one 4x4 transposed convolution of stride 2, which never
writes the upsampled tensor and needs 16 multiplications where 36 were.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ...kernels.timing import Timing, time_calls
from .session import Session, relative_error
from .workloads import MODELS as ALL_MODELS
from .workloads import Conv, UNetShape, counted, flops

MODELS = tuple(name for name, shape in ALL_MODELS.items() if isinstance(shape, UNetShape))
ROWS = (2, 16)


def run(session: Session) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        for rows in ROWS[:1] if session.tiny else ROWS:
            for model in ("tiny",) if session.tiny else MODELS:
                for site, count in sorted(counted(model, Conv, tiny=session.tiny).items()):
                    assert isinstance(site, Conv)
                    shape = f"{site.c_in}->{site.c_out} k={site.kernel} s={site.stride} {site.size}^2"
                    key = f"{model} {str(dtype)[6:]} rows={rows} {shape}{' up' if site.upsampled else ''}"
                    call = lambda s=site, r=rows, d=dtype, c=count: _measure(session, s, r, d, c)  # noqa: E731
                    if not session.measure(key, call):
                        return


def fold_upsampling(weight: torch.Tensor) -> torch.Tensor:
    """The [C_in, C_out, 4, 4] transposed-convolution weight (stride 2, padding 1) of nearest-2x + 3x3 convolution.

    weight: [C_out, C_in, 3, 3]. Along each axis the taps (a, b, c) become (c, b + c, a + b, a); sums in float32.
    """
    taps = torch.tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], device=weight.device, dtype=torch.float32)
    wide = weight.double() if weight.dtype == torch.float64 else weight.float()
    taps = taps.to(wide.dtype)
    return torch.einsum("ya,xb,oiab->ioyx", taps, taps, wide).to(weight.dtype)


def _measure(session: Session, site: Conv, rows: int, dtype: torch.dtype, count: int) -> dict[str, Any]:
    make = {"device": session.device, "dtype": dtype}
    layout = torch.channels_last
    source = site.size // 2 if site.upsampled else site.size
    x = torch.randn(rows, site.c_in, source, source, **make).to(memory_format=layout)
    scale = (site.c_in * site.kernel**2) ** -0.5
    weight = (torch.randn(site.c_out, site.c_in, site.kernel, site.kernel, **make) * scale).to(memory_format=layout)
    bias = torch.randn(site.c_out, **make)
    padding = site.kernel // 2

    def conv(use_bias: bool) -> torch.Tensor:
        wide = F.interpolate(x, scale_factor=2.0, mode="nearest") if site.upsampled else x
        return F.conv2d(wide, weight, bias if use_bias else None, site.stride, padding)

    variants = {"bias": [lambda: conv(True)], "no bias": [lambda: conv(False)]}
    facts: dict[str, Any] = {"count": count}
    if site.kernel == 1:
        matrix, columns = weight.flatten(1).t(), x.permute(0, 2, 3, 1).reshape(-1, site.c_in)
        variants["as mm"] = [lambda: torch.addmm(bias, columns, matrix)]
    if site.upsampled:
        folded = fold_upsampling(weight).to(memory_format=layout)
        variants["folded"] = [lambda: F.conv_transpose2d(x, folded, bias, 2, 1)]
        facts["folded_error"] = relative_error(F.conv_transpose2d(x, folded, bias, 2, 1), conv(True))
    work = flops(site, rows)
    for benchmark in (False, True):
        before = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = benchmark
        try:
            timings = time_calls(variants, session.device, rounds=10, budget_s=0.2)
        finally:
            torch.backends.cudnn.benchmark = before
        facts[f"cudnn.benchmark={benchmark}"] = {name: _rate(timing, work) for name, timing in timings.items()}
    return facts


def _rate(timing: Timing, work: float) -> dict[str, Any]:
    """TFLOP/s count the plain convolution's work for every variant, so that they can be compared."""
    return {"us": 1e6 * timing.median_s, "tflops": 1e-12 * work / timing.median_s, **timing.record()}
