"""Contract cases of `group_norm_silu`: real group sizes at reduced areas, every optional input, odd sites."""

import torch

from ..op import Case, Spec


def _norm(shape: tuple[int, ...], groups: int, extra_channels: int = 0, **options: object) -> dict[str, object]:
    c = shape[1] + extra_channels
    x2 = {"x2": (shape[0], extra_channels, *shape[2:])} if extra_channels else {}
    return {"x": shape, "weight": (c,), "bias": (c,), "groups": groups, "eps": 1e-5, **x2, **options}


def _statistics(rows: int, runs: int, channels: int) -> Spec:
    """Means and squared deviations, whole numbers from 0 to 7: any such are valid."""
    return Spec((rows, runs, 2, channels), torch.float32, 0, 8)


CASES = (
    Case("sd15 resnet, 10 channels a group", _norm((2, 320, 8, 8), 32)),
    Case("sd15 deepest, 40 channels a group", _norm((2, 1280, 4, 4), 32)),
    Case("vae, 4 channels a group", _norm((1, 128, 13, 11), 32)),
    Case("transformer entry, no SiLU", _norm((2, 64, 5, 7), 32, silu=False)),
    Case("time embedding per row", _norm((3, 64, 4, 4), 16, pre_bias=(3, 64))),
    Case("time embedding shared by rows", _norm((3, 64, 4, 4), 16, pre_bias=(1, 64))),
    Case("scale and shift", _norm((2, 64, 6, 6), 32, scale=(2, 64), shift=(2, 64))),
    Case("skip connection, groups straddle the seam", _norm((2, 40, 4, 4), 3, extra_channels=20)),
    Case("statistics passed in", _norm((2, 64, 9, 9), 32, partial_stats=_statistics(2, 2, 64))),
    Case(
        "statistics of two images passed in",
        _norm((2, 40, 4, 4), 3, extra_channels=20, pre_bias=(2, 60), partial_stats=_statistics(2, 1, 60)),
    ),
    Case("tokens", _norm((2, 64, 50), 32, silu=False)),
    Case("one site", _norm((2, 32, 1, 1), 4)),
)
