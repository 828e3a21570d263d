"""Triton kernel of `add_layer_norm`: one program adds and normalises a few whole rows in registers (row_tiles.py).

Fused: the residual sum, its mean and variance, normalisation and affine part. Bytes moved: 2C read + 2C written per
row in the input's dtype (4 passes; the separate add and norm move 5), weights from cache; FLOPs about 9 a value; bound:
memory, or L2 and the launch at U-Net sizes.
"""

from __future__ import annotations

import torch

from .. import row_tiles
from ..launch import Compilation, triton_op
from ..launch_configs import launch_config
from .config import Config, heuristic


def launch(
    config: Config,
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the kernel under `config`; the other arguments as the reference."""
    y, total = row_tiles.run(config, x, residual, weight, bias, eps)
    assert total is not None
    return y, total


@triton_op("add_layer_norm")
def add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch with the configuration of the shape; arguments as the reference."""
    config: Config = launch_config("add_layer_norm", heuristic, **row_tiles.sizes(x))
    return launch(config, x, residual, weight, bias, eps)


def compilations() -> list[Compilation]:
    """Every specialisation that launches on real shapes make."""
    return row_tiles.compilations(residual=True)
