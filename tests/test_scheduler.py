"""The scheduler as a state machine: in any order of events no row is lost, doubled or left behind."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from stepfuse.engine.scheduler import Scheduler

MAX_ROWS = 3


class Rows(RuleBasedStateMachine):
    """Rows are added, admitted, picked and removed at random; a plain model keeps the truth."""

    rows = Bundle("rows")

    def __init__(self) -> None:
        super().__init__()
        self.scheduler: Scheduler[int] = Scheduler(MAX_ROWS)
        self.next = 0
        self.waiting: list[tuple[int, str]] = []
        self.running: dict[int, str] = {}

    @rule(target=rows, bucket=st.sampled_from("abc"))
    def add(self, bucket: str) -> int:
        row, self.next = self.next, self.next + 1
        self.scheduler.add(row, bucket)
        self.waiting.append((row, bucket))
        return row

    @rule()
    def admit(self) -> None:
        room = MAX_ROWS - len(self.running)
        expected, self.waiting = self.waiting[:room], self.waiting[room:]
        assert self.scheduler.admit() == expected, "rows are admitted in order of arrival, as many as fit"
        self.running |= dict(expected)

    @rule()
    def pick(self) -> None:
        bucket = self.scheduler.pick()
        assert (bucket in self.running.values()) if self.running else (bucket is None)

    @rule()
    def every_bucket_gets_its_turn(self) -> None:
        buckets = set(self.running.values())
        assert {self.scheduler.pick() for _ in buckets} == buckets

    @rule(row=consumes(rows))
    def remove(self, row: int) -> None:
        self.scheduler.remove([row, -1])
        self.waiting = [entry for entry in self.waiting if entry[0] != row]
        self.running.pop(row, None)

    @invariant()
    def nothing_is_lost(self) -> None:
        assert set(self.scheduler.rows()) == {row for row, _ in self.waiting} | set(self.running)
        assert self.scheduler.running == len(self.running) <= MAX_ROWS


Rows.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestRows = Rows.TestCase
