"""Contract cases of `sampler_step`: branches, every row at its own update, rows that have ended, odd sizes.

Model rows are no case: random numbers are no valid map of them.
"""

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


_FROM = Spec((3,), torch.int64, 40, 43)
_EVERYTHING = {
    "model_output": (2, 3, 8, 9, 4),
    "extra_noise": (2, 2, 4, 9, 4),
    "mask": (2, 1, 9, 4),
    "known": (2, 2, 4, 9, 4),
    "update": Spec((2,), torch.int64, 7, 10),
    "first_line": Spec((2,), torch.int64, 5, 8),
    "limit": (2,),
}

CASES = (
    Case("sd15 guided", _rows(2, 2, (4, 16, 16), 3)),
    Case("no guidance, odd sizes", _rows(3, 1, (3, 5, 7), 2)),
    Case("noise given", _rows(2, 2, (4, 8, 8), 2, extra_noise=(2, 2, 4, 8, 8))),
    Case("another noise stream", _rows(2, 1, (4, 3, 3), 4, noise_stream=1, draws=1)),
    Case("no noise", _rows(2, 1, (4, 4, 4), 1, draws=0)),
    Case("known image", _rows(3, 2, (4, 5, 7), 2, mask=(3, 1, 5, 7), known=(3, 2, 4, 5, 7))),
    Case("learned variance", _rows(3, 2, (3, 5, 3), 2, model_output=(3, 2, 6, 5, 3))),
    Case("window of a long table", _rows(3, 1, (4, 3, 5), 3, update=Spec((3,), torch.int64, 40, 46), first_line=_FROM)),
    Case("dynamic threshold", _rows(4, 2, (3, 5, 7), 2, limit=(4,))),
    Case("everything", _rows(2, 3, (4, 9, 4), 4, **_EVERYTHING)),
)
