"""Rows that were set aside in the middle of their run, and how much memory they may keep."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

from .batch import Saved

Row = TypeVar("Row", bound=Hashable)


class Bank(Generic[Row]):
    """Parked rows by id. Above `budget` bytes a row comes without what `prepare` computed for it, most of its memory:

    the keys and values of its prompt and its time projections, which are computed again when it returns.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._saved: dict[Row, Saved] = {}

    def __len__(self) -> int:
        return len(self._saved)

    def __contains__(self, row: Row) -> bool:
        return row in self._saved

    def __getitem__(self, row: Row) -> Saved:
        return self._saved[row]

    @property
    def bytes(self) -> int:
        """Memory of all parked rows."""
        return sum(saved.bytes for saved in self._saved.values())

    def put(self, row: Row, saved: Saved) -> None:
        """Keep a row. Those that came before keep what they have: they are likely to return first."""
        assert row not in self._saved, f"row {row!r} is parked already"
        if self.bytes + saved.bytes > self.budget:
            saved.prepared = None
        self._saved[row] = saved

    def remove(self, row: Row) -> None:
        """Forget a row that goes on or has ended; unknown rows are ignored."""
        self._saved.pop(row, None)

    def shrink(self) -> None:
        """Drop whatever can be computed again."""
        for saved in self._saved.values():
            saved.prepared = None
