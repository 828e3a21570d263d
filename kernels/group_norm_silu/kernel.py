"""Triton kernels of `group_norm_silu`: one pass where a group fits on chip, two passes otherwise.

Fused: the sum with pre_bias, the concatenation with x2, group norm, scale, shift and SiLU, in the layout of the image.
Bytes moved, in tensors X of the input's dtype: one pass reads X and writes X (2 X, one launch); two passes read X twice
(3 X, three launches; the second read comes from L2 up to about 40 MB); with incoming statistics 2 X and two launches.
Statistics add 8 bytes per channel and run of at least 64 sites. FLOPs about 12 a value, two of them on the special
function unit (exp, reciprocal); bound: memory, or L2 and the launches at U-Net sizes.
"""

from __future__ import annotations

import torch

from ..launch import Compilation, triton_op
from ..launch_configs import launch_config
from ..statistics import check
from . import one_pass, two_pass
from .arguments import Image, Vectors
from .config import Config, OnePass, heuristic


def launch(
    config: Config,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float,
    silu: bool = True,
    pre_bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    x2: torch.Tensor | None = None,
    partial_stats: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run the kernels under `config`; the other arguments as the reference."""
    image, vectors = Image.of(x, x2), Vectors.of(weight, bias, pre_bias, scale, shift)
    y = image.empty()
    if partial_stats is not None:
        check(partial_stats, image.rows, image.channels, image.sites)
    if y.numel() == 0:
        return y
    if isinstance(config, OnePass):
        assert partial_stats is None, "one pass has no use for statistics"
        one_pass.launch(config, image, y, vectors, groups, eps, silu)
    else:
        two_pass.launch(config, image, y, vectors, groups, eps, silu, partial_stats)
    return y


@triton_op("group_norm_silu")
def group_norm_silu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float,
    silu: bool = True,
    pre_bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    x2: torch.Tensor | None = None,
    partial_stats: torch.Tensor | None = None,
) -> torch.Tensor:
    """Launch with the configuration of the shape; arguments as the reference."""
    sizes = {"rows": x.shape[0], "groups": groups, "width": weight.shape[0] // groups, "sites": x.shape[2:].numel()}
    given, itemsize = partial_stats is not None, x.element_size()
    config: Config = launch_config("group_norm_silu", heuristic, **sizes, statistics=given, itemsize=itemsize)
    return launch(config, x, weight, bias, groups, eps, silu, pre_bias, scale, shift, x2, partial_stats)


def compilations() -> list[Compilation]:
    """Every specialisation that launches on real shapes make."""
    return one_pass.compilations() + two_pass.compilations()
