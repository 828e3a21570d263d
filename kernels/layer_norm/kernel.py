"""Triton kernel of `layer_norm`: one program normalises a few whole rows that it holds in registers (row_tiles.py).

Fused: mean, variance, normalisation and affine part. Bytes moved: C read + C written per row in the input's dtype (2
passes), weights from cache; FLOPs about 8 a value; bound: memory, or L2 and the launch at U-Net sizes.
"""

from __future__ import annotations

import torch

from .. import row_tiles
from ..launch import Compilation, triton_op
from ..launch_configs import launch_config
from .config import Config, heuristic


def launch(
    config: Config, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """Run the kernel under `config`; the other arguments as the reference."""
    return row_tiles.run(config, x, None, weight, bias, eps)[0]


@triton_op("layer_norm")
def layer_norm(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """Launch with the configuration of the shape; arguments as the reference."""
    config: Config = launch_config("layer_norm", heuristic, **row_tiles.sizes(x))
    return launch(config, x, weight, bias, eps)


def compilations() -> list[Compilation]:
    """Every specialisation that launches on real shapes make."""
    return row_tiles.compilations(residual=False)
