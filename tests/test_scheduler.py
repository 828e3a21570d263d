"""The scheduler with numbers: shares of device time, places, deadlines, parking, out-of-memory, the queue's bound."""

from __future__ import annotations

import math
import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from stepfuse.engine.errors import QueueFull
from stepfuse.engine.scheduler import Scheduler
from stepfuse.engine.scheduling.fairness import DeficitRoundRobin


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def spent(scheduler: Scheduler[Any], cost: dict[str, float], picks: int) -> Counter[str]:
    """Device-seconds every bucket got in that many picks."""
    found: Counter[str] = Counter()
    for _ in range(picks):
        bucket = scheduler.pick()
        assert isinstance(bucket, str)
        found[bucket] += cost[bucket]
    return found


def drain(scheduler: Scheduler[Any], clock: Clock, seconds: float = 1.0, limit: int = 10_000) -> list[Any]:
    """Run until nothing is left; rows in the order in which they finish. Every row does `updates` updates."""
    left = {row: entry.updates for row, entry in scheduler._home.items()}
    buckets: dict[Any, Any] = {entry.row: entry.bucket for entry in scheduler._running}
    finished: list[Any] = []
    while len(scheduler):
        assert (limit := limit - 1), "the rows do not come to an end"
        for row, _ in scheduler.preempt():
            del buckets[row]
        buckets |= dict(scheduler.admit())
        bucket = scheduler.pick()
        clock.now += seconds
        for row in [row for row, home in buckets.items() if home == bucket]:
            left[row] -= 1
            if left[row] <= 0:
                scheduler.remove([row])
                finished.append(row)
                del buckets[row]
    return finished


# Turns of buckets.


def test_buckets_of_unequal_cost_get_equal_device_seconds():
    cost = {"small": 1.0, "large": 3.0}
    scheduler: Scheduler[int] = Scheduler(8, cost=lambda bucket, rows: cost[str(bucket)])
    scheduler.add(0, "small", updates=1000)
    scheduler.add(1, "large", updates=1000)
    scheduler.admit()
    order = [scheduler.pick() for _ in range(8)]
    assert order == ["small", "small", "small", "large"] * 2
    assert spent(scheduler, cost, 400) == {"small": 300.0, "large": 300.0}


def test_the_cost_is_that_of_the_rows_that_run():
    """Four rows that take twice as long as one make one update while the other bucket makes two."""
    scheduler: Scheduler[int] = Scheduler(8, cost=lambda bucket, rows: 2.0 if rows == 4 else 1.0)
    scheduler.add_request(range(4), "wide", updates=100)
    scheduler.add(9, "narrow", updates=100)
    scheduler.admit()
    assert Counter(scheduler.pick() for _ in range(30)) == {"narrow": 20, "wide": 10}


def test_a_client_with_many_buckets_gets_no_more_device_time():
    scheduler: Scheduler[int] = Scheduler(8)
    for row, bucket in enumerate("abcd"):
        scheduler.add(row, bucket, updates=1000, client="many")
    scheduler.add(9, "z", updates=1000, client="one")
    scheduler.admit()
    found = Counter(scheduler.pick() for _ in range(80))
    assert found == {"a": 10, "b": 10, "c": 10, "d": 10, "z": 40}


def test_a_bucket_that_joins_late_waits_one_round_and_is_owed_nothing():
    scheduler: Scheduler[int] = Scheduler(8)
    scheduler.add(0, "a", updates=1000)
    scheduler.admit()
    for _ in range(100):
        scheduler.pick()
    scheduler.add(1, "b", updates=1000)
    scheduler.admit()
    assert [scheduler.pick() for _ in range(6)] in (["b", "a"] * 3, ["a", "b"] * 3)


def test_debts_are_paid_before_the_next_service():
    turns: DeficitRoundRobin[str | None] = DeficitRoundRobin()
    prices = {None: 1.0, "b": 1.0}
    for key in prices:
        turns.join(key)
    turns.charge(None, 3.0)
    order = []
    for _ in range(8):
        order.append(turns.choose(prices))
        turns.charge(order[-1], 1.0)
    assert order == ["b", "b", "b", None, "b", None, "b", None]
    turns.charge("b", 1e9)
    turns.charge(None, 1e9 + 5)
    assert turns.choose(prices) == "b", "whole rounds of debt are skipped, not counted out"


# Places.


def test_rows_of_a_request_start_together_and_in_order():
    scheduler: Scheduler[str] = Scheduler(3)
    scheduler.add_request(["a0", "a1"], "x")
    scheduler.add_request(["b0", "b1"], "x")
    assert [row for row, _ in scheduler.admit()] == ["a0", "a1", "b0"]
    scheduler.remove(["a0"])
    assert scheduler.admit() == [("b1", "x")]
    assert (len(scheduler), scheduler.running) == (3, 3)


def test_a_flood_of_one_bucket_leaves_the_next_place_to_another():
    scheduler: Scheduler[str] = Scheduler(4)
    scheduler.add_request([f"flood{i}" for i in range(100)], "a", updates=10)
    scheduler.admit()
    scheduler.add_request(["late0", "late1"], "b", updates=10)
    scheduler.remove(["flood0"])
    assert scheduler.admit() == [("late0", "b")]
    scheduler.remove(["flood1"])
    assert scheduler.admit() == [("late1", "b")], "one running row against two"


def test_an_overdue_row_goes_before_buckets_with_fewer_rows():
    """Rows of another bucket come again and again, and would be preferred as that bucket has none running."""
    clock = Clock()
    scheduler: Scheduler[str] = Scheduler(2, patience=10.0, clock=clock)
    scheduler.add("a0", "a", updates=1000)
    scheduler.add("b0", "b", updates=1000)
    scheduler.admit()
    scheduler.add("a1", "a", updates=1000)
    started: list[str] = []
    for number in range(1, 20):
        scheduler.add(f"b{number}", "b", updates=1000)
        scheduler.remove([f"b{number - 1}"])
        started += [row for row, _ in scheduler.admit()]
        clock.now += 1
        if "a1" in started:
            break
    assert started == [*(f"b{number}" for number in range(1, 11)), "a1"]


def test_clients_get_places_by_device_seconds():
    """Rows of "long" cost three times those of "short", so that three of "short" start for each of the other."""
    scheduler: Scheduler[str] = Scheduler(8)
    scheduler.add_request([f"long{i}" for i in range(50)], "x", updates=30, client="long")
    scheduler.add_request([f"short{i}" for i in range(50)], "x", updates=10, client="short")
    names = Counter(row.rstrip("0123456789") for row, _ in scheduler.admit())
    assert names == {"short": 6, "long": 2}


def test_a_flood_of_one_client_does_not_delay_another():
    scheduler: Scheduler[str] = Scheduler(2)
    scheduler.add_request([f"flood{i}" for i in range(100)], "x", updates=10, client="flood")
    scheduler.admit()
    scheduler.add("mine", "x", updates=10, client="me")
    started: list[str] = []
    for _ in range(10):
        scheduler.pick()
    for done in ("flood0", "flood1"):
        scheduler.remove([done])
        started += [row for row, _ in scheduler.admit()]
    assert "mine" in started


@pytest.mark.parametrize("end", [Scheduler.remove, Scheduler.park])
def test_a_client_pays_for_what_he_used(end: Callable[[Scheduler[str], list[str]], None]):
    scheduler: Scheduler[str] = Scheduler(1)
    scheduler.add_request(["a0", "a1"], "x", updates=10, client="ann")
    scheduler.admit()
    assert scheduler._clients.balance("ann") == 0.0
    for _ in range(4):
        scheduler.pick()
    end(scheduler, ["a0"])
    assert scheduler._clients.balance("ann") == 6.0


def test_the_cap_counts_model_rows_and_max_rows_counts_rows():
    scheduler: Scheduler[str] = Scheduler(4, cap={"x": 6}.get)
    scheduler.add_request([f"x{i}" for i in range(5)], "x", weight=2)
    scheduler.add_request(["y0", "y1"], "y", weight=2)
    assert [row for row, _ in scheduler.admit()] == ["x0", "y0", "x1", "y1"]
    scheduler.remove(["y0", "y1"])
    assert scheduler.admit() == [("x2", "x")], "3 x 2 model rows are the cap of x"
    assert scheduler.running == 3


def test_a_row_above_the_cap_runs_alone():
    scheduler: Scheduler[str] = Scheduler(4, cap={"x": 1}.get)
    scheduler.add_request(["x0", "x1"], "x", weight=2)
    assert scheduler.admit() == [("x0", "x")]


def test_light_rows_do_not_keep_a_heavy_one_out():
    scheduler: Scheduler[str] = Scheduler(8, cap={"x": 4}.get)
    scheduler.add_request(["w0", "w1", "w2", "w3"], "x", client="light")
    scheduler.admit()
    scheduler.add("heavy", "x", weight=2, client="heavy")
    scheduler.add_request([f"l{i}" for i in range(50)], "x", client="light")
    scheduler.remove(["w0"])
    before = [row for row, _ in scheduler.admit()]
    scheduler.remove(["w1", *before])
    after = [row for row, _ in scheduler.admit()]
    scheduler.remove(["w2"])
    assert "heavy" in before + after + [row for row, _ in scheduler.admit()]


# Deadlines and parking.


def test_what_came_earlier_is_due_earlier_though_it_is_added_later():
    scheduler: Scheduler[str] = Scheduler(1, clock=lambda: 100.0)
    scheduler.add_request(["new"], "a")
    scheduler.add_request(["old"], "a", since=50.0)
    assert scheduler.admit() == [("old", "a")]


def test_the_earliest_deadline_starts_first_and_waiting_makes_a_row_due():
    clock = Clock()
    scheduler: Scheduler[str] = Scheduler(1, patience=60.0, clock=clock)
    scheduler.add("none", "x")  # due at 160
    scheduler.add("late", "x", deadline=150.0)
    scheduler.add("soon", "x", deadline=120.0)
    scheduler.add("far", "x", deadline=900.0)  # due at 160, after "none"
    clock.now += 30
    scheduler.add("new", "x", deadline=165.0)
    started = []
    while len(scheduler):
        started += [row for row, _ in scheduler.admit()]
        scheduler.remove(started)
    assert started == ["soon", "late", "none", "far", "new"]


def test_a_row_that_never_started_is_refused_after_its_deadline_and_a_running_one_goes_on():
    clock = Clock()
    scheduler: Scheduler[str] = Scheduler(1, clock=clock)
    scheduler.add("runs", "x", updates=5, deadline=105.0)
    scheduler.admit()
    scheduler.add("waits", "x", updates=5, deadline=106.0)
    clock.now = 105.5
    assert scheduler.expire() == []
    clock.now = 106.0
    assert scheduler.expire() == ["waits"]
    assert scheduler.rows() == ["runs"]
    scheduler.park(["runs"])
    assert scheduler.expire() == [], "a parked row has started"
    assert drain(scheduler, clock) == ["runs"]


def test_a_row_that_ends_between_preempt_and_admit_is_not_admitted():
    scheduler: Scheduler[str] = Scheduler(1, clock=Clock())
    scheduler.add("long", "x", updates=100)
    scheduler.admit()
    scheduler.add("urgent", "x", updates=10, deadline=120.0)
    scheduler.add("more urgent", "x", updates=5, deadline=110.0)
    assert scheduler.preempt() == [("long", "x")]
    assert scheduler.preempt() == [], "the row that was let in has not begun"
    scheduler.remove(["more urgent"])
    assert scheduler.admit() == [("urgent", "x")]


def test_a_row_let_in_is_not_parked_before_it_was_reported():
    scheduler: Scheduler[str] = Scheduler(1, clock=Clock())
    scheduler.add("long", "x", updates=100)
    scheduler.admit()
    scheduler.add("urgent", "x", updates=10, deadline=120.0)
    assert scheduler.preempt() == [("long", "x")]
    scheduler.add("more urgent", "x", updates=5, deadline=109.0)
    assert scheduler.preempt() == []
    assert scheduler.admit() == [("urgent", "x")]
    assert scheduler.preempt() == [("urgent", "x")]


def test_a_row_is_parked_for_a_deadline_at_the_last_moment_and_finishes_afterwards():
    clock = Clock()
    scheduler: Scheduler[str] = Scheduler(1, clock=clock)
    scheduler.add("long", "x", updates=100)
    scheduler.admit()
    scheduler.add("urgent", "x", updates=10, deadline=120.0)
    assert scheduler.preempt() == [("long", "x")], "starting now it is done at 110, after the long one at 210"
    assert scheduler.admit() == [("urgent", "x")]
    assert drain(scheduler, clock) == ["urgent", "long"]
    assert clock.now == 210.0, "nothing was lost: 10 + 100 updates"


def test_a_full_bucket_makes_room_within_itself():
    """The cap is what keeps the urgent row out, so a row of another bucket would be parked for nothing."""
    scheduler: Scheduler[str] = Scheduler(8, cap={"x": 2}.get, clock=Clock())
    scheduler.add("y", "y", updates=100)
    scheduler.add_request(["x0", "x1"], "x", updates=100)
    scheduler.admit()
    scheduler.add("urgent", "x", updates=10, weight=2, deadline=130.0)
    assert scheduler.preempt() == [("x1", "x"), ("x0", "x")], "two model rows are needed"
    assert scheduler.admit() == [("urgent", "x")]


@pytest.mark.parametrize(
    ("deadline", "why"), [(250.0, "it can wait for the long one"), (105.0, "it would miss it anyway")]
)
def test_nothing_is_parked_in_vain(deadline: float, why: str):
    scheduler: Scheduler[str] = Scheduler(1, clock=Clock())
    scheduler.add("long", "x", updates=100)
    scheduler.admit()
    scheduler.add("other", "x", updates=10, deadline=deadline)
    assert scheduler.preempt() == [], why


def test_a_row_with_an_earlier_deadline_is_not_parked():
    scheduler: Scheduler[str] = Scheduler(1, clock=Clock())
    scheduler.add("first", "x", updates=10, deadline=111.0)
    scheduler.admit()
    scheduler.add("second", "x", updates=10, deadline=112.0)
    assert scheduler.preempt() == []


def test_a_bucket_that_waits_a_time_slice_takes_a_place_from_the_fullest():
    clock = Clock()
    scheduler: Scheduler[str] = Scheduler(3, time_slice=2.0, clock=clock)
    scheduler.add_request(["a0", "a1"], "a", updates=100)
    scheduler.add("b0", "b", updates=100)
    scheduler.admit()
    clock.now += 5
    scheduler.add("c0", "c", updates=100)
    clock.now += 2
    assert scheduler.preempt() == []
    scheduler.add("c1", "c", updates=100)  # the bucket goes on waiting
    clock.now += 0.5
    assert scheduler.preempt() == [("a1", "a")]
    assert scheduler.admit() == [("c0", "c")]


def test_a_row_that_just_started_is_not_parked_for_a_bucket_that_waits():
    clock = Clock()
    scheduler: Scheduler[str] = Scheduler(1, time_slice=2.0, clock=clock)
    scheduler.add("a0", "a", updates=100)
    scheduler.admit()
    scheduler.add("b0", "b", updates=100)
    scheduler.add("c0", "c", updates=100)
    clock.now += 1.5
    scheduler.remove(["a0"])
    assert scheduler.admit() == [("b0", "b")]
    clock.now += 1.0
    assert scheduler.preempt() == [], "c waits for 2.5 s, but b runs for 1 s only"
    clock.now += 1.0
    assert scheduler.preempt() == [("b0", "b")]


def test_parking_is_bounded_and_everybody_finishes():
    """Three buckets on one place take turns until every row was parked twice; then each runs to its end."""
    clock = Clock()
    scheduler: Scheduler[str] = Scheduler(1, time_slice=1.0, max_parks=2, clock=clock)
    for bucket in "abc":
        scheduler.add(bucket, bucket, updates=20)
    parks: Counter[str] = Counter()
    done: Counter[str] = Counter()
    while len(scheduler):
        parks.update(row for row, _ in scheduler.preempt())
        scheduler.admit()
        bucket = scheduler.pick()
        assert isinstance(bucket, str)
        done[bucket] += 1
        clock.now += 1
        if done[bucket] == 20:
            scheduler.remove([bucket])
    assert parks == {"a": 2, "b": 2, "c": 2}
    assert clock.now == 160.0


# Out of memory.


def test_out_of_memory_halves_the_cap_and_it_grows_back():
    scheduler: Scheduler[str] = Scheduler(8, cap={"x": 8}.get, recovery=10)
    scheduler.add_request([f"r{i}" for i in range(8)], "x", updates=1000)
    scheduler.admit()
    assert scheduler.shrink("x") == ["r4", "r5", "r6", "r7"]
    assert scheduler.admit() == []
    assert len(scheduler) == 8
    sizes = []
    for _ in range(45):
        scheduler.pick()
        scheduler.admit()
        sizes.append(scheduler.running)
    assert [sizes.index(n) + 1 for n in (5, 6, 7, 8)] == [10, 20, 30, 40]


def test_a_lowered_cap_is_forgotten_where_it_reaches_what_failed():
    scheduler: Scheduler[str] = Scheduler(8, recovery=1)
    scheduler.add_request([f"r{i}" for i in range(4)], "x", updates=1000)
    scheduler.admit()
    scheduler.shrink("x")
    caps = [scheduler.caps["x"]]
    for _ in range(3):
        scheduler.pick()
        caps.append(scheduler.caps["x"])
    assert caps == [2, 3, math.inf, math.inf]


def test_out_of_memory_halves_until_one_row_is_left():
    scheduler: Scheduler[str] = Scheduler(8)
    scheduler.add_request([f"r{i}" for i in range(5)], "x", updates=10, weight=2)
    scheduler.admit()
    sizes = []
    while scheduler.shrink("x"):
        sizes.append(scheduler.running)
    assert sizes == [2, 1]
    assert len(scheduler) == 5
    cap = scheduler.caps["x"]
    assert scheduler.shrink("x") == [], "the caller has to fail the last row"
    assert scheduler.caps["x"] == cap == 2
    scheduler.add("other", "y")
    assert scheduler.admit() == [("other", "y")], "other buckets keep their caps"


# The bound of the queue.


def test_the_queue_is_bounded_in_device_seconds():
    scheduler: Scheduler[str] = Scheduler(1, cost=lambda bucket, rows: 0.5, queue_seconds=12.0)
    assert scheduler.estimated_wait() == 0.0
    scheduler.add("a", "x", updates=20)
    assert scheduler.estimated_wait() == pytest.approx(10.0)
    with pytest.raises(QueueFull) as refused:
        scheduler.add_request(["b", "c"], "x", updates=4)
    assert str(refused.value) == "queue full: got 4 s of work, bound 12 s, estimated wait 10 s; retry after 2 s"
    assert (refused.value.retry_after, refused.value.estimated_wait) == (2.0, 10.0)
    assert scheduler.rows() == ["a"], "a request is queued as a whole or not at all"
    scheduler.admit()
    for _ in range(4):
        scheduler.pick()
    assert scheduler.estimated_wait() == pytest.approx(8.0)
    scheduler.add_request(["b", "c"], "x", updates=4)
    scheduler.remove(["b"])
    assert scheduler.estimated_wait() == pytest.approx(10.0)
    scheduler.remove(["a", "c"])
    assert scheduler.estimated_wait() == 0.0
    scheduler.add("huge", "x", updates=1000)
    assert len(scheduler) == 1, "an idle engine takes any request"


def test_queue_full_survives_pickling():
    error = pickle.loads(pickle.dumps(QueueFull("queue full", retry_after=2.0)))
    assert (str(error), error.retry_after) == ("queue full", 2.0)


def test_batched_work_is_estimated_at_the_width_it_will_run_at():
    """Eight rows at a cap of four take two batches of four, whose update takes 2 s."""
    scheduler: Scheduler[str] = Scheduler(8, cap={"x": 4}.get, cost=lambda bucket, rows: rows / 2)
    scheduler.add_request([f"r{i}" for i in range(8)], "x", updates=10)
    assert scheduler.estimated_wait() == pytest.approx(2 * 10 * 2.0)
    assert scheduler.price("x", 10) == pytest.approx(10 * 2.0 / 4)
