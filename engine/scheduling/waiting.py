"""Rows that wait, by client and bucket, in the order in which they are due."""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Collection, Hashable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

Row = TypeVar("Row", bound=Hashable)


@dataclass(eq=False, slots=True)
class Entry(Generic[Row]):
    """What the scheduler knows of a row.

    due: (time, number of arrival), the order of service; deadline: infinite without one; updates: still to do; weight:
    its model rows; parks: how often it was parked; started: when it last began to run; rate: device-seconds per update
    that its client paid.
    """

    row: Row
    bucket: Hashable
    client: Hashable
    due: tuple[float, int]
    deadline: float
    updates: int
    weight: int
    parks: int = 0
    started: float | None = None
    rate: float = 0.0


class Waiting(Generic[Row]):
    """Queues of entries by client and bucket, each by due, and the entries with a deadline across all of them."""

    def __init__(self) -> None:
        self.dated: list[Entry[Row]] = []
        self._queues: dict[Hashable, dict[Hashable, list[Entry[Row]]]] = {}

    @property
    def buckets(self) -> set[Hashable]:
        """Buckets with waiting rows."""
        return {bucket for queues in self._queues.values() for bucket in queues}

    def heads(self, buckets: Collection[Hashable]) -> Iterator[Entry[Row]]:
        """The first row of every client in each of the buckets."""
        return (queue[0] for queues in self._queues.values() for bucket, queue in queues.items() if bucket in buckets)

    def push(self, entry: Entry[Row]) -> None:
        """Put an entry where its due date belongs."""
        insort(self._queues.setdefault(entry.client, {}).setdefault(entry.bucket, []), entry, key=_due)
        if entry.deadline < math.inf:
            insort(self.dated, entry, key=_due)

    def remove(self, entry: Entry[Row]) -> bool:
        """Take an entry out; whether its client still has others."""
        queues = self._queues[entry.client]
        queues[entry.bucket].remove(entry)
        if entry.deadline < math.inf:
            self.dated.remove(entry)
        if not queues[entry.bucket]:
            del queues[entry.bucket]
        if not queues:
            del self._queues[entry.client]
        return bool(queues)


def _due(entry: Entry[Row]) -> tuple[float, int]:
    return entry.due
