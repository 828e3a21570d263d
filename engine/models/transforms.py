"""Weight transforms after loading.

The same function computed from rearranged weights, on where measured to be faster.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from ..errors import RequestError, closest
from .layers import Attention, SelfAttention2d, Upsample

_TAPS = ((0, 0, 1), (0, 1, 1), (1, 1, 0), (1, 0, 0))


def fuse_qkv(module: nn.Module) -> None:
    """Project queries, keys and values of every self-attention with one GEMM of three times the width."""
    for layer in module.modules():
        if isinstance(layer, SelfAttention2d) or (isinstance(layer, Attention) and not layer.crossed):
            parts = [layer.to_q, layer.to_k, layer.to_v]
            with torch.device("meta"):
                fused = nn.Linear(parts[0].in_features, 3 * parts[0].out_features, bias=parts[0].bias is not None)
            fused.weight = nn.Parameter(torch.cat([p.weight for p in parts]), requires_grad=False)
            if parts[0].bias is not None:
                fused.bias = nn.Parameter(torch.cat([p.bias for p in parts]), requires_grad=False)
            layer.to_qkv = fused
            del layer.to_q, layer.to_k, layer.to_v


def fold_upsample(module: nn.Module) -> None:
    """Nearest-neighbour doubling followed by a 3x3 convolution as one 4x4 transposed convolution of stride 2.

    With w the taps along one side, output 2i is w0 x[i-1] + (w1 + w2) x[i] and output 2i+1 is (w0 + w1) x[i] + w2
    x[i+1]: the transposed taps are (w2, w1 + w2, w0 + w1, w0). 16 instead of 36 multiplications per input site. Images
    whose new size is not the double (odd sides of a U-Net's way down) keep the two steps.
    """
    for layer in module.modules():
        if isinstance(layer, Upsample):
            weight = layer.conv.weight
            taps = torch.tensor(_TAPS, dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device)
            folded = torch.einsum("ak,oikl,bl->ioab", taps, weight.to(taps.dtype), taps).to(weight.dtype)
            layer.folded = nn.Parameter(folded.contiguous(memory_format=torch.channels_last), requires_grad=False)


TRANSFORMS: dict[str, Callable[[nn.Module], None]] = {"fused_qkv": fuse_qkv, "folded_upsample": fold_upsample}


def check_transforms(names: Sequence[str]) -> None:
    """Raise RequestError for a name that is no transform."""
    for name in names:
        if name not in TRANSFORMS:
            raise RequestError(f"transforms: got {name!r}; {closest(name, TRANSFORMS)}")


def transform(module: nn.Module, names: Sequence[str]) -> None:
    """Apply transforms, in order, to a network whose weights are loaded."""
    check_transforms(names)
    for name in names:
        TRANSFORMS[name](module)
