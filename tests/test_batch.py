"""Rows in their buffers: whatever joins and leaves, every row keeps what it brought, and nothing else is alive."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepfuse.engine.batch import WINDOW, Arrivals, Batch
from stepfuse.engine.models.unet import Prepared
from stepfuse.kernels.sampler_step.columns import Column

SHAPE = (4, 3, 5)
FEATURES, TOKENS, EXTRA = 6, 7, 2


def arrivals(seed: int, rows: int, branches: int, updates: int) -> Arrivals:
    """Random rows whose plan has a live line for every update; every other request has a known image."""
    g = torch.Generator().manual_seed(seed)
    table = torch.randn(updates, len(Column), generator=g)
    table[:, Column.LIVE] = 1.0
    return Arrivals(
        x=torch.randn(rows, *SHAPE, generator=g),
        c_in=0.5,
        table=table,
        weights=[2.5, -1.5][:branches],
        rescale=0.25 * (seed % 2),
        threshold=(0.9 + seed / 100, 1.5) if seed % 3 else None,
        seeds=[2**62 + seed + i for i in range(rows)],
        draws=seed % 3,
        channels=4,
        prepared=Prepared(
            time=torch.randn(rows * branches, updates, FEATURES, generator=g),
            kv=torch.randn(rows * branches, TOKENS, FEATURES, generator=g),
            kv_len=torch.randint(1, TOKENS, (rows * branches,), generator=g, dtype=torch.int32),
        ),
        mask=torch.rand(rows, 1, *SHAPE[1:], generator=g) if seed % 2 else None,
        known=torch.randn(rows, 2, *SHAPE, generator=g) if seed % 2 else None,
        concat=torch.randn(rows * branches, EXTRA, *SHAPE[1:], generator=g),
    )


def check(batch: Batch, expected: dict[tuple[int, int], Arrivals]) -> None:
    """Everything of every row is where the tables say, model rows are compact, and the rest is padding."""
    state = batch.state
    assert sorted(batch.owners) == sorted(expected)
    assert sorted(place for seat in batch.seats for place in seat.places) == list(range(batch.model_rows))
    for position, (seed, i) in enumerate(batch.owners):
        new = expected[seed, i]
        branches, lines = len(new.weights), min(len(new.table), WINDOW)
        assert torch.equal(state.x[position], new.x[i])
        assert torch.equal(state.base[position], new.x[i])
        assert torch.equal(state.table[position, :lines], new.table[:lines])
        assert not state.table[position, lines:].any()
        assert state.weights[position].tolist() == new.weights + [0.0] * (batch.width - branches)
        assert state.rescale[position] == new.rescale
        assert state.threshold[position].tolist() == list(new.threshold or (0.0, 0.0))
        assert state.seeds[position] == new.seeds[i]
        if new.mask is not None:
            assert torch.equal(state.mask[position], new.mask[i])
            assert torch.equal(state.known[position], new.known[i])
        places = state.model_rows[position].tolist()
        assert places[branches:] == places[:1] * (batch.width - branches)
        for branch, place in enumerate(places[:branches]):
            source = i * branches + branch
            assert state.row_of[place] == position
            assert torch.equal(state.latent_input[place], new.x[i] * new.c_in)
            assert torch.equal(state.model_input[place, SHAPE[0] :], new.concat[source])
            assert torch.equal(state.prepared.time[place, :lines], new.prepared.time[source, :lines])
            assert torch.equal(state.prepared.kv[place], new.prepared.kv[source])
            assert state.prepared.kv_len[place] == new.prepared.kv_len[source]
    assert not state.table[len(batch) :].any(), "padding rows have no live line"
    nowhere = batch.capacity * batch.width
    assert (state.model_rows[len(batch) :] == nowhere).all(), "padding rows write to the place nobody reads"
    assert not state.row_of[batch.model_rows :].any()
    assert batch.needs.draws == max((new.draws for new in expected.values()), default=0)
    assert batch.needs.rescaled == any(new.rescale > 0 for new in expected.values())
    assert batch.needs.limited == any(new.threshold is not None for new in expected.values())
    assert batch.needs.masked == any(new.mask is not None for new in expected.values())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(1, 90), st.data()), max_size=8))
def test_rows_keep_what_they_brought_through_any_joins_and_leaves(steps: list) -> None:
    batch, expected = Batch(max_rows=9), {}
    for seed, (rows, branches, updates, data) in enumerate(steps):
        if len(batch) + rows <= batch.max_rows:
            new = arrivals(seed, rows, branches, updates)
            batch.join(new, [(seed, i) for i in range(rows)])
            expected |= {(seed, i): new for i in range(rows)}
            check(batch, expected)
        gone = data.draw(st.sets(st.integers(0, len(batch) - 1)))
        for position in gone:
            del expected[batch.owners[position]]
        batch.leave(sorted(gone))
        check(batch, expected)


def test_room_grows_by_powers_of_two_to_the_most_rows_and_never_shrinks() -> None:
    batch, seen = Batch(max_rows=6), []
    for seed in range(6):
        batch.join(arrivals(seed, 1, 1, 2), [(seed, 0)])
        seen.append(batch.capacity)
    assert seen == [1, 2, 4, 4, 6, 6]
    before = batch.state
    batch.leave([0, 1, 2, 3, 4, 5])
    batch.join(arrivals(7, 2, 1, 2), ["a", "b"])
    assert batch.state is before, "tensors stay where they are"


def test_fewer_rows_are_a_prefix_of_the_same_memory() -> None:
    batch = Batch(max_rows=4)
    batch.join(arrivals(1, 3, 2, 2), ["a", "b", "c"])
    part = batch.prefix(2, 4)
    assert part is batch.prefix(2, 4)
    assert (len(part.x), len(part.model_input), len(part.prepared.kv)) == (2, 4, 4)
    for name in ("x", "history", "table", "mask", "known", "model_input", "latent_input", "row_of"):
        assert getattr(part, name).data_ptr() == getattr(batch.state, name).data_ptr()
        assert getattr(part, name).stride() == getattr(batch.state, name).stride()


def test_a_join_that_runs_out_of_memory_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, new = Batch(max_rows=4), arrivals(1, 1, 2, 2)
    batch.join(new, [(1, 0)])
    state = batch.state

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(torch, "zeros", full)
    with pytest.raises(torch.OutOfMemoryError):
        batch.join(arrivals(2, 1, 2, 2), [(2, 0)])
    monkeypatch.undo()
    assert batch.state is state
    check(batch, {(1, 0): new})


@pytest.mark.parametrize("updates", [WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW, 5 * WINDOW + 3])
def test_the_window_holds_this_line_and_the_next_at_every_update(updates: int) -> None:
    batch, new = Batch(max_rows=4), arrivals(3, 2, 2, updates)
    late = arrivals(4, 1, 1, 2 * updates)
    batch.join(new, ["a", "b"])
    filled = set()
    for update in range(updates):
        if update == 5:
            batch.join(late, ["late"])
        batch.refill()
        for position, seat in enumerate(batch.seats):
            source = late if seat.owner == "late" else new
            first, done = int(batch.state.first_line[position]), seat.done
            filled.add((position, first))
            assert first == seat.first
            assert torch.equal(batch.state.table[position, done - first], source.table[done])
            if done + 1 < len(source.table):
                assert torch.equal(batch.state.table[position, done + 1 - first], source.table[done + 1])
            for branch, place in enumerate(seat.places):
                time = source.prepared.time[(seat.owner == "b") * len(seat.places) + branch, done]
                assert torch.equal(batch.state.prepared.time[place, done - first], time)
        batch.advance()
    assert len([first for position, first in filled if position == 0]) == max(1, -(-(updates - 1) // (WINDOW - 1)))


def test_lines_beyond_the_end_of_a_plan_are_dead_after_a_refill() -> None:
    batch, new = Batch(max_rows=1), arrivals(3, 1, 1, WINDOW + 2)
    batch.join(new, ["a"])
    for _ in range(WINDOW):
        batch.refill()
        batch.advance()
    lines = batch.state.table[0, :, Column.LIVE]
    assert lines.tolist() == [1.0] * 3 + [0.0] * (WINDOW - 3)


def test_short_plans_are_not_kept_beside_their_window() -> None:
    batch = Batch(max_rows=4)
    batch.join(arrivals(1, 1, 1, WINDOW), ["short"])
    batch.join(arrivals(2, 1, 1, WINDOW + 1), ["long"])
    assert [seat.time is None for seat in batch.seats] == [True, False]


def test_bytes_count_every_tensor() -> None:
    batch = Batch(max_rows=1)
    assert batch.bytes == 0
    new = arrivals(1, 1, 1, 2)
    batch.join(dataclasses.replace(new, prepared=Prepared(time=new.prepared.time), concat=None), ["a"])
    image, eights = 4 * 4 * 3 * 5, 8 * (4 + 1 + 2)  # update, first_line, seeds, model_rows; row_of; threshold
    floats = 4 * (WINDOW * len(Column) + 1 + 1 + WINDOW * FEATURES)
    mask, known = image // 4, 2 * image
    assert batch.bytes == image * (1 + 1 + 3 + 1 + 2) + mask + known + eights + floats + 1
