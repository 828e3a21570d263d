"""Which rows run, which wait, and whose update is next. Pure Python, no torch.

Rows are opaque hashable ids. A bucket is a set of rows that can share one forward (same latent shape and text length).
The device runs one update of one bucket at a time; running rows keep their place on the device. Three decisions:

* `pick`: buckets take turns by deficit round robin in device-seconds (`fairness.py`). A bucket's share is that of its
  clients; a client with rows in several buckets splits his own.
* `admit`: clients take turns for free places, in device-seconds, too. Of a client's rows, one of the bucket with the
  fewest running goes first, then the earliest due: at its deadline, or `patience` after it came if that is earlier.
* `preempt`: a running row is parked (it waits again, and loses nothing) where a waiting row can meet its deadline only
  now, or a bucket has waited for a whole time slice; at most `max_parks` times per row.

Whatever comes after a row is due is due later, and rows that are overdue go before all others: nobody starves.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from typing import Generic, TypeVar

from .scheduling.backlog import Backlog, CostModel, constant_cost
from .scheduling.caps import RowCaps
from .scheduling.fairness import DeficitRoundRobin
from .scheduling.running import Running
from .scheduling.waiting import Entry, Waiting

Row = TypeVar("Row", bound=Hashable)


class Scheduler(Generic[Row]):
    """Waiting and running rows. A row is in exactly one place from `add` until `remove` or `expire`.

    max_rows: the most running rows. cost: seconds of an update. cap(bucket): the most model rows of a bucket in one
    update, None for no cap (the `.get` of a table will do); a row above the cap runs alone. queue_seconds: the most
    unfinished work in device-seconds. time_slice, patience: seconds, see above. recovery: updates after which a cap
    lowered by `shrink` grows by one. clock: the time in seconds; deadlines are times of this clock.
    One thread calls it; `check`, `price` and `estimated_wait` may be called from any.
    """

    def __init__(
        self,
        max_rows: int,
        *,
        cost: CostModel = constant_cost,
        cap: Callable[[Hashable], int | None] = lambda bucket: None,
        queue_seconds: float = math.inf,
        time_slice: float = 1.0,
        patience: float = 60.0,
        max_parks: int = 2,
        recovery: int = 50,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_rows, self.time_slice, self.patience, self.max_parks = max_rows, time_slice, patience, max_parks
        self.caps = RowCaps(cap, recovery)
        self._clock = clock
        self._backlog = Backlog(cost, lambda bucket: int(min(self.caps[bucket], max_rows)), queue_seconds)
        self._home: dict[Row, Entry[Row]] = {}
        self._waiting: Waiting[Row] = Waiting()
        self._running: Running[Row] = Running(max_rows, self.caps)
        self._granted: list[Entry[Row]] = []  # running since `preempt`, and not yet returned by `admit`
        self._idle_since: dict[Hashable, float] = {}  # buckets that have waiting rows and no running ones
        self._turns: DeficitRoundRobin[Hashable] = DeficitRoundRobin()  # of buckets
        self._clients: DeficitRoundRobin[Hashable] = DeficitRoundRobin()
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._home)

    @property
    def running(self) -> int:
        """Number of running rows in all buckets."""
        return len(self._running)

    def rows(self) -> list[Row]:
        """All rows, waiting and running."""
        return list(self._home)

    def price(self, bucket: Hashable, updates: int, rows: int = 1) -> float:
        """Estimated device-seconds of `rows` model rows with that many updates."""
        return self._backlog.price(bucket, updates, rows)

    def estimated_wait(self) -> float:
        """Estimated seconds until all rows are done: the longest a row added now waits, were it served last."""
        return self._backlog.wait()

    def check(self, seconds: float, ahead: float = 0.0) -> None:
        """Raise QueueFull where that much more work exceeds the bound of the queue. ahead: accepted, not yet added."""
        self._backlog.check(seconds, ahead)

    # Rows come and go.

    def add(
        self,
        row: Row,
        bucket: Hashable,
        *,
        updates: int = 1,
        weight: int = 1,
        deadline: float | None = None,
        client: Hashable = None,
    ) -> None:
        """Queue a row; see `add_request`."""
        self.add_request([row], bucket, updates=updates, weight=weight, deadline=deadline, client=client)

    def add_request(
        self,
        rows: Sequence[Row],
        bucket: Hashable,
        *,
        updates: int = 1,
        weight: int = 1,
        deadline: float | None = None,
        client: Hashable = None,
        accepted: bool = False,
        since: float | None = None,
    ) -> None:
        """Queue the rows of one request, which start in this order.

        updates: of each row. weight: model rows of each row. deadline: time of the clock. client: whose share of the
        device they use. accepted: `check` has let them in. since: when they came, if not now. Raises QueueFull, and
        queues none, where the work would exceed the bound.
        """
        if not accepted:
            self.check(self.price(bucket, updates, weight * len(rows)))
        came, last = self._clock() if since is None else since, math.inf if deadline is None else deadline
        for row in rows:
            assert row not in self._home, f"row {row!r} was added twice"
            self._arrivals += 1
            entry = Entry(row, bucket, client, (min(last, came + self.patience), self._arrivals), last, updates, weight)
            self._home[row] = entry
            self._backlog.add(bucket, updates, weight)
            self._enqueue(entry)

    def remove(self, rows: Iterable[Row]) -> None:
        """Forget rows that finished, failed or were cancelled, wherever they are; unknown rows are ignored."""
        for entry in [self._home.pop(row) for row in set(rows) if row in self._home]:
            if entry in self._running:
                self._stop(entry)
            else:
                self._dequeue(entry)
            self._backlog.remove(entry.bucket, entry.updates, entry.weight)

    def expire(self, begun: Callable[[Row], bool] = lambda row: False) -> list[Row]:
        """Forget, and return, rows whose deadline passed before they ever started.

        begun: whether a row belongs to a request of which another has started; those stay.
        """
        now = self._clock()
        late = [e.row for e in self._waiting.dated if e.deadline <= now and e.started is None and not begun(e.row)]
        self.remove(late)
        return late

    def park(self, rows: Iterable[Row]) -> None:
        """Make running rows wait again, at their old place in the queue. The caller keeps their state."""
        for entry in [self._home[row] for row in rows]:
            if entry in self._running:
                self._stop(entry)
                entry.parks += 1
                self._enqueue(entry)

    # Decisions.

    def preempt(self) -> list[tuple[Row, Hashable]]:
        """Park running rows for rows that cannot wait, which the next `admit` returns. Returns the parked rows."""
        parked: list[Entry[Row]] = []
        now = self._clock()
        for bucket, since in list(self._idle_since.items()):
            entry = self._next({bucket}) if now - since > self.time_slice else None
            if entry is not None:
                parked += self._replace(self._hogs(now), entry)
        for entry in self._waiting.dated[: self.max_rows]:  # a copy, and no more than could be let in
            blockers = self._running.blockers(entry)
            if blockers and self._at_risk(entry, blockers, now):
                parked += self._replace(self._later(entry, blockers), entry)
        return [(entry.row, entry.bucket) for entry in parked]

    def admit(self) -> list[tuple[Row, Hashable]]:
        """Move waiting rows to running while there is room; returns the ones that moved, parked ones among them."""
        moved, self._granted = self._granted, []
        buckets = self._waiting.buckets if self.running < self.max_rows else set[Hashable]()
        while self.running < self.max_rows and (entry := self._next(buckets)) is not None:
            if self._running.fits(entry):
                self._start(entry)
                moved.append(entry)
            else:  # the room that is left is kept for this row
                buckets.discard(entry.bucket)
        return [(entry.row, entry.bucket) for entry in moved]

    def pick(self) -> Hashable | None:
        """The bucket whose turn it is, or None if nothing runs; one update of all its running rows is booked."""
        prices = {bucket: self._seconds(bucket) for bucket in self._running.buckets}
        if not prices:
            return None
        bucket = self._turns.choose(prices, self._running.shares())
        self._turns.charge(bucket, prices[bucket])
        for entry in self._running[bucket]:
            if entry.updates:
                entry.updates -= 1
                self._backlog.advance(bucket, entry.weight)
        self.caps.recover(bucket)
        return bucket

    def shrink(self, bucket: Hashable) -> list[Row]:
        """After an out-of-memory error: halve the bucket's cap and park what is above it, latest start first.

        Returns the parked rows; none where a single row ran, for which there is no smaller batch to try.
        """
        if len(self._running[bucket]) < 2:
            return []
        self.caps.lower(bucket, self._running.weight(bucket))
        parked = [entry.row for entry in self._running.above_cap(bucket)]
        self.park(parked)
        return parked

    def _next(self, buckets: Collection[Hashable]) -> Entry[Row] | None:
        """The waiting row of these buckets that is served next."""
        now = self._clock()

        def order(entry: Entry[Row]) -> tuple[int, tuple[float, int]]:
            overdue = entry.due[0] <= now
            return -1 if overdue else len(self._running[entry.bucket]), entry.due

        heads: dict[Hashable, Entry[Row]] = {}
        for entry in sorted(self._waiting.heads(buckets), key=order):
            heads.setdefault(entry.client, entry)
        return heads[self._clients.choose({c: self._price(e) for c, e in heads.items()})] if heads else None

    def _at_risk(self, entry: Entry[Row], blockers: list[Entry[Row]], now: float) -> bool:
        """Whether the row meets its deadline if it starts now, but not if it starts when a blocker is done."""
        need = self._remaining(entry)
        return need <= entry.deadline - now < need + min(map(self._remaining, blockers))

    def _hogs(self, now: float) -> list[Entry[Row]]:
        """Rows to park for a bucket that waits: they had a time slice; those of the fullest bucket first."""
        running = [e for e in self._parkable() if e.started is not None and now - e.started >= self.time_slice]
        return sorted(running, key=lambda e: (len(self._running[e.bucket]), e.deadline, e.due), reverse=True)

    def _later(self, entry: Entry[Row], blockers: list[Entry[Row]]) -> list[Entry[Row]]:
        """Rows to park for a deadline: those with a later one, the latest first."""
        running = [e for e in self._parkable() if e in blockers and e.deadline > entry.deadline]
        return sorted(running, key=lambda e: (e.deadline, e.due), reverse=True)

    def _parkable(self) -> list[Entry[Row]]:
        return [e for e in self._running if e.parks < self.max_parks and e not in self._granted]

    # Estimates.

    def _seconds(self, bucket: Hashable, more: int = 0) -> float:
        """Of the bucket's next update, with `more` model rows beside the running ones."""
        return self._backlog.update_seconds(bucket, self._running.weight(bucket) + more)

    def _remaining(self, entry: Entry[Row]) -> float:
        """Until the row is done, if it runs from now on and the buckets take equal turns."""
        runs = entry in self._running
        buckets = len({*self._running.buckets, entry.bucket})
        return max(entry.updates, 1) * self._seconds(entry.bucket, 0 if runs else entry.weight) * buckets

    def _price(self, entry: Entry[Row]) -> float:
        return self._backlog.price(entry.bucket, entry.updates, entry.weight, present=True)

    # Moves.

    def _replace(self, victims: Sequence[Entry[Row]], entry: Entry[Row]) -> list[Entry[Row]]:
        """Park as many of the victims as the entry needs to start, and start it; none where all are not enough."""
        count = next((n for n in range(len(victims) + 1) if self._running.fits(entry, victims[:n])), 0)
        if count:
            self.park([victim.row for victim in victims[:count]])
            self._start(entry)
            self._granted.append(entry)
        return list(victims[:count])

    def _enqueue(self, entry: Entry[Row]) -> None:
        self._waiting.push(entry)
        self._clients.join(entry.client)
        self._note_idle(entry.bucket)

    def _dequeue(self, entry: Entry[Row]) -> None:
        if not self._waiting.remove(entry):
            self._clients.leave(entry.client)
        self._note_idle(entry.bucket)

    def _start(self, entry: Entry[Row]) -> None:
        price = self._price(entry)
        entry.started, entry.rate = self._clock(), price / max(entry.updates, 1)
        self._clients.charge(entry.client, price)
        self._running.start(entry)
        self._turns.join(entry.bucket)
        self._dequeue(entry)

    def _stop(self, entry: Entry[Row]) -> None:
        self._running.stop(entry)
        if entry in self._granted:
            self._granted.remove(entry)
        if not self._running[entry.bucket]:
            self._turns.leave(entry.bucket)
        self._clients.charge(entry.client, -entry.rate * entry.updates)
        self._note_idle(entry.bucket)

    def _note_idle(self, bucket: Hashable) -> None:
        if self._running[bucket] or bucket not in self._waiting.buckets:
            self._idle_since.pop(bucket, None)
        else:
            self._idle_since.setdefault(bucket, self._clock())
