"""Batches of real requests, to be updated by a runner without an engine around it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ...engine import pipeline
from ...engine.batch import Batch
from ...engine.components import Components
from ...engine.config import EngineConfig
from ...engine.request import Request
from ...engine.runner import Runner
from ...engine.settling import settle
from ..random_models import random_model
from .session import Session

BUCKET = "measured"
STEPS = 60  # fewer than the lines of a table that are on hand in the batch: nothing is refilled while it is timed


def model(session: Session, arch: str, **options: Any) -> Components:
    """Random weights of an architecture, in the part's dtype unless `options` say otherwise; tiny in a tiny run."""
    given = {"device": str(session.device), "dtype": session.dtype} | options
    return random_model("tiny" if session.tiny else arch, EngineConfig(**given))


def configured(parts: Components, **options: Any) -> Components:
    """The same networks under another configuration."""
    return replace(parts, config=replace(parts.config, **options))


@torch.inference_mode()
def join(parts: Components, batch: Batch, request: Request) -> None:
    """Encode a request and let its rows join; they are owned by (seed, image)."""
    settled = settle(parts, request)
    ((conditioning, _),) = pipeline.encode(parts, [settled])
    images = range(len(settled.seeds))
    batch.join(pipeline.start(parts, settled, conditioning, images), [(request.seed, image) for image in images])


def filled(parts: Components, runner: Runner, requests: Sequence[Request]) -> Batch:
    """A batch of the runner's with the rows of these requests."""
    batch = runner.batch(BUCKET)
    for request in requests:
        join(parts, batch, request)
    return batch


class Updates:
    """Every call is one update of all rows, as the engine makes it; before a row's last one all go back to the start.

    before: x of the rows [R, C, h, w] at the start.
    """

    def __init__(self, runner: Runner, batch: Batch) -> None:
        self.runner, self.batch = runner, batch
        state = batch.state
        self._changed = [state.x, state.base, state.history, state.update, state.bad, state.model_input]
        self._start = [tensor.clone() for tensor in self._changed]
        self.before = self._start[0][: len(batch)]

    def __call__(self) -> None:
        if any(seat.done + 1 >= seat.updates for seat in self.batch.seats):
            self.rewind()
        self.runner.update(self.batch)

    @torch.inference_mode()
    def rewind(self) -> None:
        """Back to the start."""
        torch._foreach_copy_(self._changed, self._start)
        for seat in self.batch.seats:
            seat.done = 0

    def moved(self) -> torch.Tensor:
        """How far the updates since the start took the rows, [R, C, h, w]."""
        return self.batch.state.x[: len(self.batch)] - self.before
