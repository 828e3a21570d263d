"""What an update costs, learnt from updates as they run."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping

CLIP = 4.0
"""A single update counts as this many times the estimate at most: some hold a capture or a compilation."""


class MeasuredCosts:
    """(bucket, model rows) -> seconds of an update: an exponential average of those that ran.

    size(bucket): pixels; kind(bucket): what runs there. Buckets of one kind and size cost the same. smoothing: weight
    of a new measurement. Other numbers of rows are interpolated; a size that never ran is scaled from the nearest one
    of its kind. Zero until the kind was measured: what is unknown is not refused. `note` is for one thread, calls for
    any.
    """

    def __init__(
        self,
        size: Callable[[Hashable], int],
        kind: Callable[[Hashable], Hashable] = lambda bucket: None,
        smoothing: float = 0.1,
    ) -> None:
        self._size, self._kind, self._smoothing = size, kind, smoothing
        self._seconds: dict[Hashable, dict[int, dict[int, float]]] = {}
        self._first: set[tuple[Hashable, int, int]] = set()

    def note(self, bucket: Hashable, rows: int, seconds: float) -> None:
        """An update of that many model rows took so long. The second one replaces the first, which warmed up."""
        kind, size = self._kind(bucket), self._size(bucket)
        sizes = self._seconds.get(kind, {})
        times = sizes.get(size, {})
        before = times.get(rows)
        if before is None:
            self._first.add((kind, size, rows))
            # another thread never sees a kind or a size without a time
            self._seconds[kind] = sizes | {size: times | {rows: seconds}}
        elif (kind, size, rows) in self._first:
            self._first.discard((kind, size, rows))
            times[rows] = min(seconds, CLIP * before)
        else:
            times[rows] = before + self._smoothing * (min(seconds, CLIP * before) - before)

    def __call__(self, bucket: Hashable, rows: int) -> float:
        """Estimated seconds of one update."""
        size, sizes = self._size(bucket), self._seconds.get(self._kind(bucket))
        if not sizes:
            return 0.0
        exact = sizes.get(size, {}).get(rows)  # the usual case: without sorting
        if exact is not None:
            return exact
        near = min(sizes, key=lambda other: abs(math.log(other / size)))
        return interpolate(sizes[near], rows) * size / near


def interpolate(times: Mapping[int, float], rows: int) -> float:
    """Seconds of an update, from some numbers of rows: between them linear, above in proportion, below the same."""
    known = sorted(times)
    above = next((n for n in known if n >= rows), None)
    if above is None:
        return times[known[-1]] * rows / known[-1]
    below = max((n for n in known if n < rows), default=above)
    if above in (rows, below):
        return times[above]
    return times[below] + (times[above] - times[below]) * (rows - below) / (above - below)
