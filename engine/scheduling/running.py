"""Rows that run, by bucket in order of start, and whether there is room for another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Iterator
from typing import Generic, TypeVar

from .caps import RowCaps
from .waiting import Entry

Row = TypeVar("Row", bound=Hashable)


class Running(Generic[Row]):
    """At most `max_rows` entries, and per bucket at most as many model rows as its cap; one row may always run."""

    def __init__(self, max_rows: int, caps: RowCaps) -> None:
        self.max_rows, self.caps = max_rows, caps
        self._rows: dict[Hashable, list[Entry[Row]]] = {}

    def __len__(self) -> int:
        return sum(len(entries) for entries in self._rows.values())

    def __iter__(self) -> Iterator[Entry[Row]]:
        return (entry for entries in self._rows.values() for entry in entries)

    def __contains__(self, entry: Entry[Row]) -> bool:
        return entry in self._rows.get(entry.bucket, ())

    def __getitem__(self, bucket: Hashable) -> list[Entry[Row]]:
        return self._rows.get(bucket, [])

    @property
    def buckets(self) -> Collection[Hashable]:
        """Buckets with running rows."""
        return self._rows.keys()

    def start(self, entry: Entry[Row]) -> None:
        """Put a row after those of its bucket."""
        self._rows.setdefault(entry.bucket, []).append(entry)

    def stop(self, entry: Entry[Row]) -> None:
        """Take a row out."""
        self._rows[entry.bucket].remove(entry)
        if not self._rows[entry.bucket]:
            del self._rows[entry.bucket]

    def weight(self, bucket: Hashable) -> int:
        """Model rows of the bucket's next update."""
        return total_weight(self[bucket])

    def fits(self, entry: Entry[Row], without: Collection[Entry[Row]] = ()) -> bool:
        """Whether the entry could start, were the rows `without` gone."""
        if len(self) - len(without) >= self.max_rows:
            return False
        beside = total_weight(other for other in self[entry.bucket] if other not in without)
        return not beside or beside + entry.weight <= self.caps[entry.bucket]

    def blockers(self, entry: Entry[Row]) -> list[Entry[Row]]:
        """Rows of which some have to go before the entry can start; none where there is room."""
        if self.fits(entry):
            return []
        return list(self) if len(self) >= self.max_rows else self[entry.bucket]

    def above_cap(self, bucket: Hashable) -> list[Entry[Row]]:
        """The last rows of a bucket, so many that the others are within its cap; never the first."""
        entries = self[bucket]
        fitting = (n for n in range(len(entries), 1, -1) if total_weight(entries[:n]) <= self.caps[bucket])
        return entries[next(fitting, 1) :]

    def shares(self) -> dict[Hashable, float]:
        """Shares of device time of the buckets: one for every client, split over the buckets he has rows in."""
        clients = {bucket: {entry.client for entry in entries} for bucket, entries in self._rows.items()}
        spread = Counter(client for group in clients.values() for client in group)
        return {bucket: sum(1 / spread[client] for client in group) for bucket, group in clients.items()}


def total_weight(entries: Iterable[Entry[Row]]) -> int:
    """Model rows of the entries."""
    return sum(entry.weight for entry in entries)
