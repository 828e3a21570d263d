"""Two ways to serve a load with one engine: rows, and static batches of requests with equal parameters.

Both use the same loaded engine, so networks, kernels and row cap are the same; only who runs with whom differs.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Hashable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from ..engine.request import Request, Result
from .mix import parameters

if TYPE_CHECKING:
    from ..engine.engine import Engine

WAIT_S = 0.05  # a group that is not full waits this long for more


class Front(Protocol):
    """Serves requests; `close` waits for what was asked for."""

    name: str

    async def run(self, request: Request) -> Result: ...

    def close(self) -> None: ...


class Rows:
    """Every request goes to the engine at once; its rows join the running batch."""

    name = "rows"

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    async def run(self, request: Request) -> Result:
        """Queue a request and wait for its result."""
        return await self.engine.submit(request)

    def close(self) -> None:
        """Nothing to do: the engine belongs to the caller."""


class Static:
    """Requests of equal parameters (all but prompt and seed) wait together and run as one batch, to its end.

    A group runs when it holds `cap` images or its oldest request has waited `wait_s`; one group at a time, the one that
    waited longest first. Requests that arrive while a group runs wait for the next one. Results of a batch are handed
    out when the batch is done, as servers of static batches do. LoRAs of a group are merged into the weights before it
    runs, where the group before it had others.
    """

    name = "static"

    def __init__(self, engine: Engine, cap: int, wait_s: float = WAIT_S) -> None:
        self.engine, self.cap, self.wait_s = engine, cap, wait_s
        self.batches: list[int] = []
        """Requests in every batch that ran."""
        self._groups: dict[Hashable, deque[tuple[float, Request, Future[Result]]]] = {}
        self._news = threading.Condition()
        self._closed = False
        self._merged: tuple[tuple[str, float], ...] = ()
        self._worker = threading.Thread(target=self._serve, name="static-batches", daemon=True)
        self._worker.start()

    async def run(self, request: Request) -> Result:
        """Queue a request and wait for its result. Raises ValueError for more images than a batch holds."""
        if request.n > self.cap:
            raise ValueError(f"n: got {request.n}, expected at most {self.cap}, the most images of a batch")
        future: Future[Result] = Future()
        with self._news:
            self._groups.setdefault(parameters(request), deque()).append((time.perf_counter(), request, future))
            self._news.notify_all()
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Run what is waiting, then stop; the engine has no LoRAs then."""
        with self._news:
            self._closed = True
            self._news.notify_all()
        self._worker.join()
        self._merge(())

    def _serve(self) -> None:
        while group := self._next():
            self.batches.append(len(group))
            try:
                self._merge(group[0][1].loras)
                results = self.engine.generate([replace(request, loras=()) for _, request, _ in group])
            except Exception as error:  # boundary: a failed batch ends its requests, not the front
                for _, _, future in group:
                    future.set_exception(error)
                continue
            for (_, _, future), result in zip(group, results, strict=True):
                future.set_result(result)

    def _merge(self, loras: tuple[tuple[str, float], ...]) -> None:
        if loras != self._merged:
            self.engine.set_loras(loras)
            self._merged = loras

    def _next(self) -> Sequence[tuple[float, Request, Future[Result]]]:
        """Wait for a group that may run; empty when closed and nothing is left."""
        with self._news:
            while True:
                oldest = sorted(self._groups.items(), key=lambda item: item[1][0][0])
                for key, group in oldest:
                    waited = time.perf_counter() - group[0][0]
                    if self._closed or waited >= self.wait_s or sum(r.n for _, r, _ in group) >= self.cap:
                        return self._take(key)
                if self._closed:
                    return []
                left = None if not oldest else self.wait_s - (time.perf_counter() - oldest[0][1][0][0])
                self._news.wait(None if left is None else max(left, 1e-4))

    def _take(self, key: Hashable) -> list[tuple[float, Request, Future[Result]]]:
        group, taken, images = self._groups[key], [], 0
        while group and images + group[0][1].n <= self.cap:
            taken.append(group.popleft())
            images += taken[-1][1].n
        if not group:
            del self._groups[key]
        return taken
