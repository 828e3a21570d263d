"""How many model rows one update of a bucket may have, lowered by out-of-memory errors for a while."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass


@dataclass(slots=True)
class _Lowered:
    now: int
    full: int
    updates: int = 0


class RowCaps:
    """full(bucket): the cap of a bucket where all is well, None for none. recovery: updates between two raises.

    An out-of-memory error halves a cap, and it grows back by one every `recovery` updates of the bucket: additive
    increase, multiplicative decrease, as in congestion control (Chiu and Jain, 1989).
    """

    def __init__(self, full: Callable[[Hashable], int | None], recovery: int) -> None:
        self._full, self._recovery = full, recovery
        self._lowered: dict[Hashable, _Lowered] = {}

    def __getitem__(self, bucket: Hashable) -> float:
        """The most model rows of one update now; infinite without a cap."""
        full, lowered = self._full(bucket), self._lowered.get(bucket)
        return min(math.inf if full is None else full, math.inf if lowered is None else lowered.now)

    def lower(self, bucket: Hashable, failed: int) -> None:
        """An update of `failed` model rows ran out of memory."""
        full, before = self._full(bucket), self._lowered.get(bucket)
        if full is None:
            full = failed if before is None else max(failed, before.full)
        self._lowered[bucket] = _Lowered(max(1, failed // 2), full)

    def recover(self, bucket: Hashable) -> None:
        """An update of the bucket is about to run."""
        lowered = self._lowered.get(bucket)
        if lowered is None:
            return
        lowered.updates += 1
        if lowered.updates % self._recovery == 0:
            lowered.now += 1
            if lowered.now >= lowered.full:
                del self._lowered[bucket]
