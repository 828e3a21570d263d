"""Accounting of device memory: bytes of a row from plain numbers, and a budget with least-recently-used eviction."""

from __future__ import annotations

import random

import pytest

from stepfuse.engine.errors import MemoryBudgetError
from stepfuse.engine.memory import Budget, RowSize, activation_bytes, gigabytes

SDXL = RowSize(
    channels=4, height=128, width=128, updates=30, columns=16, tokens=77, prompt_columns=2 * 83_200, activations=10**9
)
"""Keys and values of the 70 cross-attention layers of SDXL: 10 of 640 channels, 60 of 1280."""


def test_bytes_of_an_sdxl_row():
    assert SDXL.prompt_columns == 2 * (10 * 640 + 60 * 1280)
    assert SDXL.prepared == 77 * 166_400 * 2 == 25_625_600, "26 MB of prompt keys and values per branch"
    assert SDXL.sampler == 4 * (8 * 4 * 128 * 128 + 30 * 16)
    assert SDXL.held(2) == SDXL.sampler + 2 * 25_625_600
    assert SDXL.total(2) - SDXL.held(2) == 2 * 10**9


def test_time_tables_grow_with_the_updates():
    row = RowSize(channels=4, height=64, width=64, updates=20, columns=16, time_columns=1000, element=4)
    assert row.prepared == 20 * 1000 * 4
    assert row.held() - row.sampler == row.prepared


def test_activations_grow_with_the_area_and_hold_the_skips():
    small, large = (activation_bytes((320, 640, 1280), 2, side, side) for side in (64, 128))
    assert large == 4 * small
    assert small == 2 * (3 * 64 * 64 * (320 + 640 // 4 + 1280 // 16) + 8 * 320 * 64 * 64)


def test_the_most_rows_that_fit():
    row = RowSize(channels=1, height=1, width=1, updates=0, columns=0, activations=68)
    assert (row.total(), row.total(2)) == (100, 168)
    budget = Budget(1000, headroom=0.1)
    assert (budget.largest_rows(row), budget.largest_rows(row, 2)) == (9, 5)
    budget.hold("others", 450)
    assert budget.largest_rows(row) == 4
    budget.rest("others")
    assert budget.largest_rows(row) == 9, "idle holders can go"


def test_a_row_that_never_fits_is_refused_with_a_reason():
    row = RowSize(channels=4, height=256, width=256, updates=0, columns=0, activations=3_100_000_000)
    budget = Budget(2_000_000_000, headroom=0.0)
    with pytest.raises(MemoryBudgetError) as refused:
        budget.require(row, 1, 2048, 2048)
    assert str(refused.value) == "one row of 2048x2048 needs 3.1 GB, budget 2.0 GB; lower width or height"
    with pytest.raises(MemoryBudgetError, match=r"needs 6\.2 GB.* or use guidance_scale=1"):
        budget.require(row, 2, 2048, 2048)
    Budget(4_000_000_000, headroom=0.0).require(row, 1, 2048, 2048)


def test_idle_holders_are_evicted_least_recently_used_first():
    budget = Budget(100, headroom=0.0)
    for name in "abcd":
        budget.hold(name, 20)
    for name in "cab":
        budget.rest(name)
    assert budget.evictions(20) == [], "20 are free"
    assert budget.evictions(50) == ["c", "a"]
    budget.use("c")
    assert budget.evictions(50) == ["a", "b"]
    budget.rest("c")
    assert budget.idle == ["a", "b", "c"]
    assert budget.evictions(80) == ["a", "b", "c"]
    assert budget.fits(80)
    assert budget.evictions(81) is None
    assert not budget.fits(81)


def test_holding_more_than_is_free_is_refused_and_changes_nothing():
    budget = Budget(100, headroom=0.0)
    budget.hold("a", 60)
    with pytest.raises(MemoryBudgetError, match=r"b needs 0\.0 MB, free are"):
        budget.hold("b", 41)
    with pytest.raises(MemoryBudgetError):
        budget.hold("a", 101)
    budget.hold("a", 100)
    budget.release("nobody")
    assert (budget.used, budget.free) == (100, 0)


def test_bytes_are_conserved_in_any_order():
    rng = random.Random(3)
    budget, truth = Budget(1000, headroom=0.0), dict[str, int]()
    idle: list[str] = []
    for _ in range(3000):
        name, size = rng.choice("abcdefgh"), rng.randrange(1, 400)
        act = rng.choice(["hold", "rest", "use", "release"])
        if act == "hold":
            for other in budget.evictions(max(0, size - truth.get(name, 0))) or []:
                budget.release(other)
                idle.remove(other)
                del truth[other]
            if sum(truth.values()) - truth.get(name, 0) + size <= 1000:
                budget.hold(name, size)
                truth[name] = size
            else:
                with pytest.raises(MemoryBudgetError):
                    budget.hold(name, size)
                continue
        elif act == "release":
            budget.release(name)
            truth.pop(name, None)
        elif name in truth:
            getattr(budget, act)(name)
        idle = [other for other in idle if other != name] + ([name] if act == "rest" and name in truth else [])
        assert budget.idle == idle
        assert (budget.used, budget.free) == (sum(truth.values()), 1000 - sum(truth.values()))
        assert budget.used <= 1000


def test_bytes_as_text():
    assert [gigabytes(size) for size in (3_100_000_000, 100_000_000, 51_200_000)] == ["3.1 GB", "0.1 GB", "51.2 MB"]
