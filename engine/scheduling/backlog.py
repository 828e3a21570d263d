"""Unfinished work in device-seconds: what a client pays, how long the queue is, and when it is full."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable

from ..errors import QueueFull

CostModel = Callable[[Hashable, int], float]
"""(bucket, model rows) -> seconds of one update of that many model rows."""

SHORTEST = 1e-9
"""Seconds; prices of zero would let a bucket run for ever in its turn."""


def constant_cost(bucket: Hashable, rows: int) -> float:
    """The cost model before calibration: every update takes one unit of time, whatever its bucket and rows."""
    return 1.0


class Backlog:
    """Work to do per bucket, counted in updates of one model row and priced by the cost model.

    bound: the most unfinished work in device-seconds. widest(bucket): the most model rows of one update.
    `wait`, `price` and `check` only read, and may be called from any thread.
    """

    def __init__(self, cost: CostModel, widest: Callable[[Hashable], int], bound: float = math.inf) -> None:
        self.bound = bound
        self._cost, self._widest = cost, widest
        self._work: Counter[Hashable] = Counter()
        self._rows: Counter[Hashable] = Counter()

    def update_seconds(self, bucket: Hashable, rows: int) -> float:
        """Seconds of one update of `rows` model rows."""
        return max(self._cost(bucket, rows), SHORTEST)

    def price(self, bucket: Hashable, updates: int, rows: int, present: bool = False) -> float:
        """Device-seconds of `updates` updates of `rows` model rows, batched with what the bucket has.

        present: the rows are already among the bucket's.
        """
        together = self._rows[bucket] + (0 if present else rows)
        width = max(1, min(together, self._widest(bucket)))
        return max(updates, 1) * rows * self.update_seconds(bucket, width) / width

    def wait(self) -> float:
        """Device-seconds until everything that was added is done."""
        return sum(
            work / rows * self.price(bucket, 1, rows, present=True)
            for bucket, work in list(self._work.items())
            if (rows := self._rows[bucket])
        )

    def check(self, seconds: float, ahead: float = 0.0) -> None:
        """Raise QueueFull where `seconds` more work would exceed the bound; an empty queue takes any request.

        ahead: seconds of work that was accepted and not yet added.
        """
        wait = self.wait() + ahead
        if wait > 0 and wait + seconds > self.bound:
            later = min(wait, wait + seconds - self.bound)
            raise QueueFull(
                f"queue full: got {seconds:.3g} s of work, bound {self.bound:.3g} s, estimated wait {wait:.3g} s; "
                f"retry after {later:.3g} s",
                estimated_wait=wait,
                retry_after=later,
            )

    def add(self, bucket: Hashable, updates: int, rows: int) -> None:
        """Book `updates` updates of `rows` model rows."""
        self._rows[bucket] += rows
        self._work[bucket] += updates * rows

    def advance(self, bucket: Hashable, rows: int) -> None:
        """One update of `rows` model rows was done."""
        self._work[bucket] -= rows

    def remove(self, bucket: Hashable, updates: int, rows: int) -> None:
        """Take out rows with `updates` updates left."""
        self._rows[bucket] -= rows
        self._work[bucket] -= updates * rows
        if not self._rows[bucket]:
            del self._rows[bucket], self._work[bucket]
