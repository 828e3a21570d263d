"""Which rows run next. Pure Python, no torch: rows are opaque hashable ids, buckets are hashable keys.

A bucket is a set of rows that can share one forward (same latent shape and text length). Rows
wait first come, first served; at most `max_rows` run at once; buckets with running rows take turns, one update each.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

Row = TypeVar("Row", bound=Hashable)


class Scheduler(Generic[Row]):
    """Waiting and running rows by bucket. A row is in exactly one place from `add` until `remove`."""

    def __init__(self, max_rows: int) -> None:
        self.max_rows = max_rows
        self._waiting: deque[tuple[Row, Hashable]] = deque()
        self._running: OrderedDict[Hashable, list[Row]] = OrderedDict()
        self._home: dict[Row, Hashable] = {}

    def __len__(self) -> int:
        return len(self._home)

    @property
    def running(self) -> int:
        """Number of running rows in all buckets."""
        return sum(len(rows) for rows in self._running.values())

    def rows(self) -> list[Row]:
        """All rows, waiting and running."""
        return list(self._home)

    def add(self, row: Row, bucket: Hashable) -> None:
        """Put a row at the end of the queue."""
        assert row not in self._home, f"row {row!r} was added twice"
        self._home[row] = bucket
        self._waiting.append((row, bucket))

    def admit(self) -> list[tuple[Row, Hashable]]:
        """Move waiting rows to running, in order of arrival, while there is room; returns the ones that moved."""
        moved: list[tuple[Row, Hashable]] = []
        room = self.max_rows - self.running
        while self._waiting and room > 0:
            row, bucket = self._waiting.popleft()
            self._running.setdefault(bucket, []).append(row)
            moved.append((row, bucket))
            room -= 1
        return moved

    def pick(self) -> Hashable | None:
        """The bucket whose turn it is, or None if nothing runs."""
        if not self._running:
            return None
        bucket = next(iter(self._running))
        self._running.move_to_end(bucket)
        return bucket

    def remove(self, rows: Iterable[Row]) -> None:
        """Forget rows that finished, failed or were cancelled, wherever they are; unknown rows are ignored."""
        gone = {row for row in rows if row in self._home}
        if not gone:
            return
        self._waiting = deque(entry for entry in self._waiting if entry[0] not in gone)
        for bucket in {self._home.pop(row) for row in gone}:
            left = [row for row in self._running.get(bucket, []) if row not in gone]
            if left:
                self._running[bucket] = left
            else:
                self._running.pop(bucket, None)
