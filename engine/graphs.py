"""Recorded updates: what has been captured, how often it was replayed, and what is forgotten when memory runs short.

A capture holds addresses. Everything it reads and writes lies in static buffers outside its memory pool, so one pool
serves all captures of a stream in any order; captures that may run at the same time need a `Captures` each.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

WARM_UP = 3
"""Runs before a capture: there libraries allocate workspaces and cuDNN chooses algorithms, which a capture cannot."""

Run = Callable[[], None]


class Replayable(Protocol):
    """Something recorded that can be done again."""

    def replay(self) -> None:
        """Do it again on the current stream, with what the buffers hold now."""
        ...


class Recorder(Protocol):
    """How a run is recorded."""

    def record(self, run: Run) -> tuple[Replayable, int]:
        """Run it a few times, record it, and return the recording with the bytes it holds."""
        ...


class CudaRecorder:
    """Captures CUDA graphs on a stream of its own, all into one memory pool.

    benchmark: let cuDNN choose its algorithms by timing them, which may end differently in every process.
    """

    def __init__(self, device: torch.device, benchmark: bool = True) -> None:
        self.device, self.benchmark = device, benchmark
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def record(self, run: Run) -> tuple[Replayable, int]:
        """Warm up, then capture. Other threads may go on using CUDA meanwhile."""
        chosen = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = self.benchmark
        try:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.stream):
                for _ in range(WARM_UP):
                    run()
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
            before = torch.cuda.memory_reserved(self.device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                run()
        finally:
            torch.backends.cudnn.benchmark = chosen
        return graph, max(0, torch.cuda.memory_reserved(self.device) - before)


class Capture(NamedTuple):
    """A recording and the bytes the pool grew by for it."""

    recorded: Replayable
    bytes: int


class Captures:
    """Recordings by key; the least recently used ones are forgotten above a byte budget.

    Keys are (owner, *what): `forget` drops an owner's. captured, replayed: how often, since the start.
    """

    def __init__(self, recorder: Recorder, budget: int) -> None:
        self.recorder, self.budget = recorder, budget
        self.captured = self.replayed = 0
        self._kept: OrderedDict[tuple[Hashable, ...], Capture] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, key: tuple[Hashable, ...]) -> bool:
        return key in self._kept

    @property
    def bytes(self) -> int:
        """What the recordings hold; memory that several share is counted with the first."""
        return sum(capture.bytes for capture in self._kept.values())

    def replay(self, key: tuple[Hashable, ...], run: Run, state: Sequence[Tensor]) -> None:
        """Replay `key`; it is recorded from `run` first if it is not there."""
        self.capture(key, run, state)
        self._kept.move_to_end(key)
        self._kept[key].recorded.replay()
        self.replayed += 1

    def capture(self, key: tuple[Hashable, ...], run: Run, state: Sequence[Tensor]) -> None:
        """Record `run` under `key` unless it is there. `state`: every tensor it changes; they keep their values."""
        if key in self._kept:
            return
        saved = [tensor.clone() for tensor in state]
        try:
            self._kept[key] = Capture(*self.recorder.record(run))
        finally:
            torch._foreach_copy_(list(state), saved)
        self.captured += 1
        while self.bytes > self.budget and len(self._kept) > 1:
            self._kept.popitem(last=False)

    def forget(self, owner: Hashable) -> None:
        """Drop the recordings of an owner whose buffers are gone."""
        for key in [key for key in self._kept if key[0] is owner]:
            del self._kept[key]

    def clear(self) -> None:
        """Drop everything."""
        self._kept.clear()


def planned_sizes(most: int) -> tuple[int, ...]:
    """Model rows that updates are recorded for: 1, 2, 4, 6, 8, 12, 16, 24 ... `most`.

    Other numbers are padded to the next: a third of the rows at worst, and 2 log2(most) recordings for a shape.
    """
    grown = [n << k for k in range(most.bit_length()) for n in (2, 3)]
    return tuple(sorted({1, most, *(n for n in grown if n < most and n != 3)}))
