"""The scheduler as a state machine: in any order of events every row ends exactly once, and nobody starves."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from stepfuse.engine.errors import QueueFull
from stepfuse.engine.scheduler import Scheduler

MAX_ROWS = 4
MAX_PARKS = 2
BOUND = 900.0
BASE = {"a": 1.0, "b": 3.0, "c": 0.5}
CAPS = {"a": 3, "b": None, "c": 2}
BUCKETS, CLIENTS = st.sampled_from("abc"), st.sampled_from(["ann", "bob", None])
LONG = 120
MOST_PICKS = 90
"""Between two turns of a bucket: about 50 is the most for these costs, caps and shares of four rows; less than LONG."""


def cost(bucket: object, rows: int) -> float:
    return BASE[str(bucket)] * (1 + (rows - 1) / 4)


class Rows(RuleBasedStateMachine):
    """What an engine does, in any order. `state` is the plain truth: where every row is and what it has still to do."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.scheduler: Scheduler[int] = Scheduler(
            MAX_ROWS, cost=cost, cap=CAPS.get, queue_seconds=BOUND, time_slice=4.0, patience=30.0, max_parks=MAX_PARKS,
            recovery=5, clock=lambda: self.now,
        )  # fmt: skip
        self.bucket: dict[int, str] = {}
        self.weight: dict[int, int] = {}
        self.deadline: dict[int, float] = {}
        self.left: dict[int, int] = {}
        self.waiting: set[int] = set()
        self.running: set[int] = set()
        self.started: set[int] = set()
        self.ended: Counter[int] = Counter()
        self.unserved: Counter[str] = Counter()
        self.parked: Counter[int] = Counter()

    @initialize()
    def flood(self) -> None:
        """Long rows of two buckets are there before everybody else."""
        self.put("a", "ann", 5, LONG, 1, None)
        self.put("c", "bob", 1, LONG, 1, None)

    def put(
        self, bucket: str, client: str | None, rows: int, updates: int, weight: int, deadline: float | None
    ) -> None:
        fresh = list(range(len(self.bucket), len(self.bucket) + rows))
        when = None if deadline is None else self.now + deadline
        wait, work = self.scheduler.estimated_wait(), self.scheduler.price(bucket, updates, weight * rows)
        options: dict[str, Any] = {"updates": updates, "weight": weight, "deadline": when, "client": client}
        if wait > 0 and wait + work > BOUND:
            with pytest.raises(QueueFull) as full:
                self.scheduler.add_request(fresh, bucket, **options)
            assert 0 < full.value.retry_after <= full.value.estimated_wait == wait
            return
        self.scheduler.add_request(fresh, bucket, **options)
        for row in fresh:
            self.bucket[row], self.weight[row], self.left[row] = bucket, weight, updates
            self.deadline[row] = math.inf if when is None else when
        self.waiting |= set(fresh)

    def end(self, rows: set[int]) -> None:
        self.ended.update(rows)
        self.waiting -= rows
        self.running -= rows
        for bucket in set(self.unserved) - {self.bucket[row] for row in self.running}:
            del self.unserved[bucket]

    @rule(
        bucket=BUCKETS, client=CLIENTS, rows=st.integers(1, 3), updates=st.integers(1, 6) | st.just(LONG),
        weight=st.integers(1, 2), deadline=st.none() | st.floats(-1, 40),
    )  # fmt: skip
    def add(
        self, bucket: str, client: str | None, rows: int, updates: int, weight: int, deadline: float | None
    ) -> None:
        self.put(bucket, client, rows, updates, weight, deadline)

    @rule(seconds=st.floats(0, 10))
    def tick(self, seconds: float) -> None:
        self.now += seconds

    @rule(data=st.data())
    def cancel_or_fail(self, data: st.DataObject) -> None:
        known = sorted(self.bucket)
        rows = set(data.draw(st.lists(st.sampled_from(known), max_size=3)))
        self.scheduler.remove([*rows, *rows, -1])
        self.end(rows & (self.waiting | self.running))

    @rule()
    def expire(self) -> None:
        late = set(self.scheduler.expire())
        expected = {row for row in self.waiting - self.started if self.deadline[row] <= self.now}
        assert late == expected, "rows whose deadline passed before they started, and no others"
        self.end(late)

    @rule(data=st.data())
    def join(self, data: st.DataObject) -> None:
        """Preempt and admit, as the engine does between two updates; rows may end in between."""
        self.preempt()
        self.cancel_or_fail(data)
        self.admit()

    def preempt(self) -> None:
        parked = self.scheduler.preempt()
        self.leave([row for row, _ in parked])
        assert all(self.parked[row] <= MAX_PARKS for row, _ in parked), "a row is preempted a bounded number of times"

    def admit(self) -> None:
        moved = self.scheduler.admit()
        rows = [row for row, _ in moved]
        assert len(set(rows)) == len(rows)
        assert set(rows) <= self.waiting
        assert all(self.bucket[row] == bucket for row, bucket in moved)
        self.waiting -= set(rows)
        self.running |= set(rows)
        self.started |= set(rows)
        assert self.running or not self.waiting, "somebody runs"
        if len(self.running) < MAX_ROWS:
            for row in self.waiting:
                others = {self.bucket[other] for other in self.running}
                assert self.bucket[row] in others, "a bucket without running rows has room"

    def leave(self, rows: list[int]) -> None:
        assert set(rows) <= self.running
        self.parked.update(rows)
        self.running -= set(rows)
        self.waiting |= set(rows)
        self.end(set())

    @rule(data=st.data())
    def park(self, data: st.DataObject) -> None:
        rows = data.draw(st.lists(st.sampled_from(sorted(self.bucket)), max_size=2, unique=True))
        present = [row for row in rows if row in self.running]
        self.scheduler.park(present)
        self.leave(present)

    @rule(bucket=BUCKETS)
    def out_of_memory(self, bucket: str) -> None:
        before = {row for row in self.running if self.bucket[row] == bucket}
        parked = self.scheduler.shrink(bucket)
        assert set(parked) < before or not before, "the first row stays"
        assert parked or len(before) < 2 or self.weigh(bucket) <= 1, "a batch of several rows gets smaller"
        failed = self.weigh(bucket)
        self.leave(parked)
        rest = before - set(parked)
        assert len(rest) <= 1 or sum(self.weight[row] for row in rest) <= failed // 2

    @rule(times=st.integers(1, 10))
    def update(self, times: int) -> None:
        for _ in range(times):
            bucket = self.scheduler.pick()
            there = {self.bucket[row] for row in self.running}
            assert (bucket in there) if there else (bucket is None)
            if isinstance(bucket, str):
                self.advance(bucket, there)

    def advance(self, bucket: str, there: set[str]) -> None:
        self.now += cost(bucket, self.weigh(bucket))
        self.unserved.update(there)
        self.unserved[bucket] = 0
        assert max(self.unserved.values()) <= MOST_PICKS, "every running bucket gets its turn"
        mine = {row for row in self.running if self.bucket[row] == bucket}
        for row in mine:
            self.left[row] -= 1
        finished = {row for row in mine if self.left[row] <= 0}
        self.scheduler.remove(finished)
        self.end(finished)

    def weigh(self, bucket: str) -> int:
        return sum(self.weight[row] for row in self.running if self.bucket[row] == bucket)

    @invariant()
    def every_row_is_in_one_place(self) -> None:
        assert len(self.scheduler) == len(self.waiting) + len(self.running)
        assert set(self.scheduler.rows()) == self.waiting | self.running
        assert not self.waiting & self.running
        assert set(self.bucket) == self.waiting | self.running | set(self.ended)
        assert max(self.ended.values(), default=1) == 1, "a row ends once"
        assert self.scheduler.running == len(self.running) <= MAX_ROWS
        for bucket, cap in CAPS.items():
            rows = [row for row in self.running if self.bucket[row] == bucket]
            assert len(rows) <= 1 or cap is None or self.weigh(bucket) <= cap

    @precondition(lambda self: not self.scheduler.rows())
    @invariant()
    def an_empty_scheduler_holds_nothing(self) -> None:
        assert self.scheduler.estimated_wait() == 0
        assert not self.scheduler._idle_since
        assert not self.scheduler._granted
        assert not self.scheduler._waiting.dated
        assert not self.scheduler._waiting.buckets
        assert not self.scheduler._turns._deficit
        assert not self.scheduler._clients._deficit

    def teardown(self) -> None:
        """Whatever happened: from here on every row ends, after no more updates than there is work."""
        work = sum(self.left[row] for row in self.waiting | self.running)
        for _ in range(work):
            if not len(self.scheduler):
                break
            self.expire()
            self.preempt()
            self.admit()
            self.update(1)
        assert not self.scheduler.rows(), "somebody starves"
        assert set(self.ended) == set(self.bucket)
        self.an_empty_scheduler_holds_nothing()


Rows.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestRows = Rows.TestCase
