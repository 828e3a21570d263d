"""Contract cases of `sampler_step`: branches, every row at its own update, rows that have ended, odd sizes."""

import torch

from ..op import Case, Spec
from .columns import HISTORY, Column


def _rows(rows: int, branches: int, shape: tuple[int, ...], lines: int, **extra: object) -> dict[str, object]:
    return {
        "x": (rows, *shape),
        "base": (rows, *shape),
        "history": (rows, HISTORY, *shape),
        "model_output": (rows, branches, *shape),
        "table": (rows, lines, len(Column)),
        "update": Spec((rows,), torch.int64, 0, lines + 1),
        "weights": (rows, branches),
        "seeds": Spec((rows,), torch.int64, 0, 2**62),
        **extra,
    }


CASES = (
    Case("sd15 guided", _rows(2, 2, (4, 16, 16), 3)),
    Case("no guidance, odd sizes", _rows(3, 1, (3, 5, 7), 2)),
    Case("noise given", _rows(2, 2, (4, 8, 8), 2, extra_noise=(2, 2, 4, 8, 8))),
    Case("another noise stream", _rows(2, 1, (4, 3, 3), 4, noise_stream=1, draws=1)),
    Case("no noise", _rows(2, 1, (4, 4, 4), 1, draws=0)),
)
