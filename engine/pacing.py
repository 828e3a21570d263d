"""How far the host runs before the device, and how long updates take."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Hashable

import torch

AHEAD = 1
"""Updates that are queued on the device behind the one that runs: enough to keep it busy."""


class Pace:
    """Called around every update. note(bucket, model rows, seconds): told how long each took.

    Without it the host would put all updates of a request on a CUDA device at once, and a row that comes meanwhile
    could join, and one that is cancelled could leave, only after the last of them. The device's own clock is read once
    it is past an update.
    """

    def __init__(self, device: torch.device, note: Callable[[Hashable, int, float], None]) -> None:
        self._cuda, self._note = device.type == "cuda", note
        self._began = 0.0
        self._start: torch.cuda.Event | None = None
        self._queued: deque[tuple[torch.cuda.Event, torch.cuda.Event, Hashable, int]] = deque()

    def begin(self) -> None:
        """An update is about to be queued."""
        if self._cuda:
            self._start = _now()
        else:
            self._began = time.perf_counter()

    def end(self, bucket: Hashable, model_rows: int) -> None:
        """An update was queued; waits for the device where it is too far behind."""
        if not self._cuda:
            self._note(bucket, model_rows, time.perf_counter() - self._began)
            return
        assert self._start is not None, "end() comes after begin()"
        self._queued.append((self._start, _now(), bucket, model_rows))
        while len(self._queued) > AHEAD:
            start, end, bucket, model_rows = self._queued.popleft()
            end.synchronize()
            self._note(bucket, model_rows, start.elapsed_time(end) / 1000)


def _now() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True, blocking=True)
    event.record()
    return event
