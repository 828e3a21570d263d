"""One decode of the SDXL autoencoder at 1024 x 1024, by diffusers: dtype, layout, compilation, folding, attention.

The error of each variant against float32 is recorded beside its time: fp16 overflows with some published weights, and a
picture is what counts, so the peak signal-to-noise ratio of the decoded picture is given too.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...kernels.timing import time_call
from .convs import fold_upsampling
from .session import Session, relative_error

SDXL = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
}
TINY = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
VARIANTS = (
    ("bf16 nhwc", torch.bfloat16, ()),
    ("bf16 nhwc folded", torch.bfloat16, ("fold",)),
    ("bf16 nhwc folded unfused-attention", torch.bfloat16, ("fold", "products")),
    ("bf16 nhwc compiled", torch.bfloat16, ("compile",)),
    ("bf16 nhwc folded unfused-attention compiled", torch.bfloat16, ("fold", "products", "compile")),
    ("fp16 nhwc", torch.float16, ()),
    ("bf16 nchw", torch.bfloat16, ("nchw",)),
    ("fp32 nchw", torch.float32, ("nchw",)),
)


def run(session: Session) -> None:
    case = "tiny" if session.tiny else "sdxl 1024^2"
    keys = [f"{case} {name}" for name, _, _ in VARIANTS]
    if all(key in session.finished for key in keys):
        return
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        session.write(
            f"{case} skipped", error=f"diffusers cannot be imported ({error}); pass --wheels FOLDER with its wheel"
        )
        return
    size = 8 if session.tiny else 128
    with torch.device(session.device):
        weights = AutoencoderKL(**(TINY if session.tiny else SDXL)).eval().requires_grad_(False).state_dict()
        latents = torch.randn(1, 4, size, size)
    truth = _decoder(session, weights, torch.float32, ("nchw",))(latents)
    for key, (_, dtype, options) in zip(keys, VARIANTS, strict=True):
        if not session.measure(key, lambda d=dtype, o=options: _measure(session, weights, latents, truth, d, o)):
            return


def _decoder(session: Session, weights: dict[str, torch.Tensor], dtype: torch.dtype, options: tuple[str, ...]) -> Any:
    from diffusers import AutoencoderKL

    with torch.device(session.device):
        vae: Any = AutoencoderKL(**(TINY if session.tiny else SDXL)).eval().requires_grad_(False)
    vae.load_state_dict(weights)
    vae.to(dtype)
    if "nchw" not in options:
        vae.to(memory_format=torch.channels_last)
    if "fold" in options:
        for block in vae.decoder.up_blocks:
            for index, upsampler in enumerate(block.upsamplers or ()):
                block.upsamplers[index] = FoldedUpsample(upsampler.conv)
    if "products" in options:
        vae.decoder.mid_block.attentions[0].processor = PlainAttention()

    def decode(latents: torch.Tensor) -> torch.Tensor:
        return vae.decode(latents.to(dtype), return_dict=False)[0]

    if "compile" in options:
        torch._dynamo.reset()
        return torch.compile(decode, fullgraph=True, dynamic=False, backend="eager" if session.tiny else "inductor")
    return decode


class FoldedUpsample(nn.Module):
    """Nearest-2x upsampling and the 3x3 convolution after it, as one transposed convolution."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        folded = fold_upsampling(conv.weight)
        self.weight = nn.Parameter(folded.contiguous(memory_format=torch.channels_last), requires_grad=False)
        self.bias = conv.bias

    def forward(self, x: torch.Tensor, output_size: object = None) -> torch.Tensor:
        return F.conv_transpose2d(x, self.weight, self.bias, 2, 1)


class PlainAttention:
    """Single-head attention as two products and a float32 softmax: at a head of 512, fused kernels spill."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: None = None,
        attention_mask: None = None,
        temb: None = None,
    ) -> torch.Tensor:
        rows, channels, height, width = hidden_states.shape
        x = hidden_states.flatten(2)
        if attn.group_norm is not None:
            x = attn.group_norm(x)
        x = x.transpose(1, 2)
        q, k, v = attn.to_q(x), attn.to_k(x), attn.to_v(x)
        scores = torch.baddbmm(q.new_empty(1), q, k.transpose(1, 2), beta=0, alpha=channels**-0.5)
        mixed = torch.softmax(scores, -1, dtype=torch.float32).to(v.dtype) @ v
        out = attn.to_out[0](mixed).transpose(1, 2).reshape(rows, channels, height, width)
        return (out + hidden_states if attn.residual_connection else out) / attn.rescale_output_factor


def _measure(
    session: Session,
    weights: dict[str, torch.Tensor],
    latents: torch.Tensor,
    truth: torch.Tensor,
    dtype: torch.dtype,
    options: tuple[str, ...],
) -> dict[str, Any]:
    decode = _decoder(session, weights, dtype, options)
    out = decode(latents)
    if not bool(out.isfinite().all()):
        raise ValueError(f"the decoded picture is not finite in {dtype}")
    error = (out.double() - truth.double()).square().mean()
    peak = truth.double().abs().max()
    psnr = 20 * math.log10(float(peak)) - 10 * math.log10(max(float(error), 1e-30))
    timing = time_call(lambda: decode(latents), session.device, rounds=10, launches=1, budget_s=5.0)
    return {
        "ms": 1e3 * timing.median_s,
        "error_vs_float32": relative_error(out, truth),
        "psnr_db": psnr,
        **timing.record(),
    }
