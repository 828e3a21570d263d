"""Device state of the running rows. A row is one image; rows of one batch may differ in everything but shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
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
    """R rows with J guidance branches each: latents and history float32 [R, ...], tables float32 [R, U, K].

    x, base: [R, C, h, w]; history: [R, 3, C, h, w]; model_input: c_in * x of the next update; update: int64 [R], the
    next line of each row's table; weights: [R, J] guidance weights; rescale: [R] guidance_rescale; seeds: int64 [R];
    bad: bool [R], NaN or Inf was seen; prepared: R * J model rows. owners: host ids of the rows. draws: the most noises
    one update of any row needs (0: all rows are deterministic).
    """

    owners: list[Any]
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

    def __len__(self) -> int:
        return len(self.owners)

    @property
    def branches(self) -> int:
        """Guidance branches per row, J."""
        return self.weights.shape[1]

    def join(self, other: Batch) -> Batch:
        """A batch with the rows of `other` after these."""
        longest = max(self.table.shape[1], other.table.shape[1])
        tables = [F.pad(part.table, (0, 0, 0, longest - part.table.shape[1])) for part in (self, other)]
        joined: dict[str, Any] = {
            f.name: torch.cat([getattr(self, f.name), getattr(other, f.name)])
            for f in fields(self)
            if f.name not in ("owners", "table", "prepared", "draws")
        }
        prepared = type(self.prepared).cat([self.prepared, other.prepared])
        draws = max(self.draws, other.draws)
        return Batch(
            owners=self.owners + other.owners, table=torch.cat(tables), prepared=prepared, draws=draws, **joined
        )

    def select(self, rows: Sequence[int]) -> Batch:
        """A batch with only the rows at positions `rows`."""
        index = torch.tensor(list(rows), dtype=torch.int64, device=self.x.device)
        branch = torch.arange(self.branches, device=self.x.device)
        model_rows = (index[:, None] * self.branches + branch).flatten()
        kept: dict[str, Any] = {
            f.name: getattr(self, f.name)[index] for f in fields(self) if f.name not in ("owners", "prepared", "draws")
        }
        owners = [self.owners[row] for row in rows]
        prepared = self.prepared.index_select(model_rows)
        return Batch(owners=owners, prepared=prepared, draws=self.draws, **kept)
