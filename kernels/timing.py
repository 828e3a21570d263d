"""The one timer of the project: medians of many rounds, warm or cold caches, host or CUDA-graph launches.

Kernels under about 50 us are timed as a CUDA graph of many launches, because an event pair around one launch measures
the launch. A call is *cold* when it rotates over buffers that together exceed the L2 cache three times, *warm* when its
producer has just written its input; decisions use the state that the model sees.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch

GRAPH_LAUNCHES = 50
BACKLOG = 3  # replays queued ahead, so that the host's launch time is hidden


@dataclass(frozen=True)
class Timing:
    """Seconds per call: median, 10th and 90th percentile over `rounds` rounds of `calls` calls each."""

    median_s: float
    p10_s: float
    p90_s: float
    rounds: int
    calls: int
    method: str  # "graph", "events" or "host"

    def record(self) -> dict[str, float | int | str]:
        return asdict(self)


def summarize(seconds: Sequence[float], calls: int, method: str) -> Timing:
    """Timing of `seconds`, one entry per round of `calls` calls. Raises ValueError when there is none."""
    if not seconds:
        raise ValueError("no rounds were timed; expected at least one")
    ordered = sorted(s / calls for s in seconds)
    last = len(ordered) - 1
    return Timing(
        median_s=statistics.median(ordered),
        p10_s=ordered[round(0.1 * last)],
        p90_s=ordered[round(0.9 * last)],
        rounds=len(ordered),
        calls=calls,
        method=method,
    )


def time_calls(
    variants: Mapping[str, Sequence[Callable[[], object]]],
    device: torch.device,
    *,
    rounds: int = 20,
    graph: bool = True,
    launches: int = GRAPH_LAUNCHES,
    budget_s: float = 2.0,
) -> dict[str, Timing]:
    """Time variants against each other in one process, in the order A B B A, so that drift of clocks hits all alike.

    Each variant is a sequence of callables over different buffers, called in turn (one: warm caches; many: cold).
    graph=True captures `launches` calls in a CUDA graph; on a CPU, and with graph=False, calls are launched one by one.
    Stops early when `budget_s` seconds are spent, after at least three rounds.
    """
    if device.type == "cuda":
        if graph:
            timers = {name: _GraphTimer(calls, launches) for name, calls in variants.items()}
        else:
            timers = {name: _EventTimer(calls) for name, calls in variants.items()}
    else:
        timers = {name: _HostTimer(calls) for name, calls in variants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    start = time.perf_counter()
    for index in range(rounds):
        if index >= 3 and time.perf_counter() - start > budget_s:
            break
        for name in list(timers) if index % 2 == 0 else reversed(timers):
            seconds[name].append(timers[name].round())
    return {name: summarize(seconds[name], timer.calls, timer.method) for name, timer in timers.items()}


def time_call(call: Callable[[], object], device: torch.device, **options: object) -> Timing:
    """Timing of one call with warm caches; options as in `time_calls`."""
    return time_calls({"call": [call]}, device, **options)["call"]  # type: ignore[arg-type]


def buffers_for_cold(nbytes: int, device: torch.device, *, most: int = 64) -> int:
    """How many buffers of `nbytes` a call must rotate over so that none is in the L2 cache when its turn comes."""
    if device.type != "cuda":
        return 1
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(most, -(-3 * l2 // max(nbytes, 1))))


class _HostTimer:
    method = "host"

    def __init__(self, calls: Sequence[Callable[[], object]]) -> None:
        self.functions = calls
        self.calls = len(calls)
        for call in calls:
            call()

    def round(self) -> float:
        start = time.perf_counter()
        for call in self.functions:
            call()
        return time.perf_counter() - start


class _EventTimer:
    method = "events"

    def __init__(self, calls: Sequence[Callable[[], object]]) -> None:
        self.functions = calls
        self.calls = len(calls)
        for _ in range(3):
            for call in calls:
                call()
        torch.cuda.synchronize()

    def round(self) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for call in self.functions:
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3


class _GraphTimer:
    method = "graph"

    def __init__(self, calls: Sequence[Callable[[], object]], launches: int) -> None:
        self.calls = max(launches, len(calls))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries choose algorithms and allocate workspaces before the capture
            for _ in range(3):
                for call in calls:
                    call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for index in range(self.calls):
                calls[index % len(calls)]()
        self.graph.replay()
        torch.cuda.synchronize()

    def round(self) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(BACKLOG):
            self.graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / BACKLOG
