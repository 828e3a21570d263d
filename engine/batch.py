"""Device state of the running rows. A row is one image; rows of one batch may differ in everything but shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol, Self

import torch
import torch.nn.functional as F


class ModelRows(Protocol):
    """Step-invariant inputs of the denoiser, with the model rows (row 0 branch 0, row 0 branch 1, row 1 ...) first."""

    def index_select(self, rows: torch.Tensor) -> Self:
        """The model rows at int64 index `rows`, in that order."""
        ...

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """The model rows of all parts, one part after the other; shorter timestep tables are padded."""
        ...


@dataclass(eq=False)
class Batch:
    """R rows with up to J guidance branches each, evaluated as M model rows: one per branch a row has.

    x, base: float32 [R, C, h, w]; history: [R, 3, C, h, w]; model_input: c_in * x of the next update; table: [R, U, K];
    update: int64 [R], the next line of each row's table; weights: [R, J] guidance weights, 0 for branches a row does
    not have; rescale: [R] guidance_rescale; seeds: int64 [R]; bad: bool [R], NaN or Inf was seen; prepared: M model
    rows. owners: host ids of the rows; branches: how many each has; draws: the most noises one update of any row needs
    (0: all rows are deterministic);
    rescaled: whether any row has a guidance_rescale.
    """

    owners: list[Any]
    branches: list[int]
    x: torch.Tensor
    base: torch.Tensor
    history: torch.Tensor
    model_input: torch.Tensor
    table: torch.Tensor
    update: torch.Tensor
    weights: torch.Tensor
    rescale: torch.Tensor
    seeds: torch.Tensor
    bad: torch.Tensor
    prepared: ModelRows
    draws: int = 0
    rescaled: bool = False

    def __post_init__(self) -> None:
        device = self.x.device
        self.row_of = torch.tensor([row for row, n in enumerate(self.branches) for _ in range(n)], device=device)
        """int64 [M], the row of every model row."""
        width, found = self.weights.shape[1], self._model_rows()
        self.model_rows = torch.tensor([rows + rows[:1] * (width - len(rows)) for rows in found], device=device)
        """int64 [R, J], the model row of every branch; branches a row does not have point at its first."""

    def __len__(self) -> int:
        return len(self.owners)

    def join(self, other: Batch) -> Batch:
        """A batch with the rows of `other` after these."""
        lines = max(self.table.shape[1], other.table.shape[1])
        width = max(self.weights.shape[1], other.weights.shape[1])
        joined: dict[str, Any] = {}
        for name in _PER_ROW:
            parts = [getattr(self, name), getattr(other, name)]
            if name == "table":
                parts = [F.pad(part, (0, 0, 0, lines - part.shape[1])) for part in parts]
            if name == "weights":
                parts = [F.pad(part, (0, width - part.shape[1])) for part in parts]
            joined[name] = torch.cat(parts)
        return Batch(
            owners=self.owners + other.owners,
            branches=self.branches + other.branches,
            prepared=type(self.prepared).cat([self.prepared, other.prepared]),
            draws=max(self.draws, other.draws),
            rescaled=self.rescaled or other.rescaled,
            **joined,
        )

    def select(self, rows: Sequence[int]) -> Batch:
        """A batch with only the rows at positions `rows`."""
        found, device = self._model_rows(), self.x.device
        index = torch.tensor(list(rows), dtype=torch.int64, device=device)
        model_rows = torch.tensor([m for row in rows for m in found[row]], dtype=torch.int64, device=device)
        return Batch(
            owners=[self.owners[row] for row in rows],
            branches=[self.branches[row] for row in rows],
            prepared=self.prepared.index_select(model_rows),
            draws=self.draws,
            rescaled=self.rescaled,
            **{name: getattr(self, name)[index] for name in _PER_ROW},
        )

    def _model_rows(self) -> list[list[int]]:
        starts = [0, *accumulate(self.branches)]
        return [list(range(start, start + n)) for start, n in zip(starts, self.branches, strict=False)]


_PER_ROW = ("x", "base", "history", "model_input", "table", "update", "weights", "rescale", "seeds", "bad")
