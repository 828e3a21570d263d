"""Captures: what is recorded once, what is forgotten, and what keeps its value."""

from __future__ import annotations

import pytest
import torch
from reference.recording import DryRecorder

from stepfuse.engine.graphs import WARM_UP, Captures, CudaRecorder, planned_sizes


def counter() -> torch.Tensor:
    return torch.zeros(1, dtype=torch.int64)


def test_a_recording_is_made_once_and_leaves_the_state_as_it_was() -> None:
    captures, x, python = Captures(DryRecorder(frozen=True), 1), counter(), []

    def run() -> None:
        python.append(1)
        x.add_(1)

    for _ in range(5):
        captures.replay(("a", 1), run, [x])
    assert x.item() == 5, "runs before the recording do not count"
    assert len(python) == WARM_UP + 1, "a replay runs no Python"
    assert (captures.captured, captures.replayed) == (1, 5)


def test_a_recording_that_fails_leaves_the_state_as_it_was() -> None:
    captures, x = Captures(DryRecorder(), 1), counter()

    def run() -> None:
        x.add_(1)
        if x.item() == 2:
            raise torch.OutOfMemoryError("no memory")

    with pytest.raises(torch.OutOfMemoryError):
        captures.replay(("a", 1), run, [x])
    assert (x.item(), len(captures), captures.captured) == (0, 0, 0)


def test_the_least_recently_used_recording_goes_above_the_budget() -> None:
    captures, x = Captures(DryRecorder(size=40), budget=100), counter()
    for key in (("a", 1), ("a", 2), ("a", 1), ("a", 3)):
        captures.replay(key, lambda: x.add_(1), [x])
    assert [("a", n) in captures for n in (1, 2, 3)] == [True, False, True]
    assert (len(captures), captures.bytes) == (2, 80)
    captures.replay(("a", 2), lambda: x.add_(1), [x])
    assert captures.captured == 4
    tight = Captures(DryRecorder(size=40), budget=10)
    tight.replay(("a", 1), lambda: x.add_(1), [x])
    assert len(tight) == 1, "the one in use stays"


def test_an_owner_takes_its_recordings_along() -> None:
    captures, x, owners = Captures(DryRecorder(), 1), counter(), [object(), object()]
    for owner in owners:
        for size in (1, 2):
            captures.capture((owner, size), lambda: x.add_(1), [x])
    captures.forget(owners[0])
    assert [(owner, 1) in captures for owner in owners] == [False, True]
    captures.clear()
    assert len(captures) == 0


@pytest.mark.parametrize(
    ("most", "sizes"),
    [(1, (1,)), (2, (1, 2)), (5, (1, 2, 4, 5)), (6, (1, 2, 4, 6)), (20, (1, 2, 4, 6, 8, 12, 16, 20))],
)
def test_planned_sizes(most: int, sizes: tuple[int, ...]) -> None:
    assert planned_sizes(most) == sizes


def test_padding_is_a_third_at_worst_and_sizes_are_few() -> None:
    for most in range(1, 200):
        sizes = planned_sizes(most)
        assert len(sizes) <= 2 * most.bit_length()
        for n in range(4, most + 1):
            assert next(size for size in sizes if size >= n) < 1.5 * n


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_captures_share_a_pool_and_replay_in_any_order() -> None:
    device = torch.device("cuda")
    weight, x = torch.randn(64, 64, device=device), torch.randn(8, 64, device=device)
    captures, start = Captures(CudaRecorder(device), 2**30), x.clone()
    order = [8, 2, 4, 1, 4, 8, 2, 1, 1, 2]
    for size in order:
        captures.replay(("a", size), lambda size=size: x[:size].copy_(torch.tanh(x[:size] @ weight)), [x])
    expected = start
    for size in order:
        expected = torch.cat([torch.tanh(expected[:size] @ weight), expected[size:]])
    assert captures.captured == 4
    assert torch.allclose(x, expected, atol=1e-5)
