"""Deficit round robin: who is served next, so that everybody gets the same device time whatever one service costs.

M. Shreedhar, G. Varghese, "Efficient fair queueing using deficit round robin", SIGCOMM 1995.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


class DeficitRoundRobin(Generic[Key]):
    """Keys in a round, each with a deficit: the device-seconds it may still spend.

    When its turn comes, a key's deficit grows by weight * quantum, and it is served until it cannot pay. The quantum is
    the dearest price (by weight) of those that ask: every turn serves at least once, and turns are short. Between two
    services of a key, each other key is served at most (quantum * its weight + its price) / its price times, but for
    debts.
    """

    def __init__(self) -> None:
        self._deficit: OrderedDict[Key, float] = OrderedDict()
        self._turn: tuple[Key, ...] = ()  # the key that is being served, if any

    def join(self, key: Key) -> None:
        """Put a key at the end of the round, with nothing saved; a key that is there keeps its place."""
        self._deficit.setdefault(key, 0.0)

    def leave(self, key: Key) -> None:
        """Take a key out; what it saved or owed is forgotten."""
        self._deficit.pop(key, None)
        if self._turn == (key,):
            self._turn = ()

    def balance(self, key: Key) -> float:
        """Device-seconds the key may spend; negative: it was served ahead of its turn."""
        return self._deficit.get(key, 0.0)

    def charge(self, key: Key, seconds: float) -> None:
        """Book a service, or give back (negative seconds) what was not used."""
        if key in self._deficit:
            self._deficit[key] -= seconds

    def choose(self, prices: Mapping[Key, float], weights: Mapping[Key, float] | None = None) -> Key:
        """The key to serve next among those in `prices` (device-seconds of one service); the caller charges it.

        Keys that are in the round but not in `prices` have nothing to serve now and are passed over. weights: shares of
        device time, by default equal.
        """
        assert all(price > 0 for price in prices.values()), "a service that costs nothing would be served for ever"
        assert all(key in self._deficit for key in prices), "only keys that joined the round can be served"
        grants = {key: 1.0 if weights is None else weights[key] for key in prices}
        quantum = max(price / grants[key] for key, price in prices.items())
        grants = {key: weight * quantum for key, weight in grants.items()}
        self._skip_rounds(prices, grants)
        while True:
            for key in [key for key in self._deficit if key in prices]:
                if self._turn != (key,):
                    self._end_turn()
                    self._turn = (key,)
                    self._deficit[key] += grants[key]
                if self._deficit[key] >= prices[key]:
                    return key
                self._end_turn()

    def _end_turn(self) -> None:
        for key in self._turn:
            self._deficit.move_to_end(key)
        self._turn = ()

    def _skip_rounds(self, prices: Mapping[Key, float], grants: Mapping[Key, float]) -> None:
        """Grant at once the whole rounds in which nobody could pay, because all are in debt."""
        rounds = min(math.ceil((prices[key] - self._deficit[key]) / grant) for key, grant in grants.items()) - 1
        for key in prices if rounds > 0 else ():
            self._deficit[key] += rounds * grants[key]
