"""The rows on the device: the running batch of every bucket, and the bank of rows that were set aside."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TypeVar

import torch

from . import pipeline
from .batch import Batch
from .components import Components
from .parking import Bank
from .runner import Runner
from .ticket import Row, Ticket

T = TypeVar("T")


class Batches:
    """Where rows are: in the batch of their bucket, in the bank, or nowhere (they have not started, or they ended).

    Only buckets with running rows have a batch here.
    """

    def __init__(self, parts: Components, runner: Runner) -> None:
        self.parts, self.runner = parts, runner
        self.bank: Bank[Row] = Bank(parts.config.parked_bytes)
        self._batches: dict[Hashable, Batch] = {}

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._batches.values())

    def __getitem__(self, bucket: Hashable) -> Batch:
        return self._batches[bucket]

    def with_room(self, run: Callable[[], T]) -> T:
        """run(), and once more after giving back what does not run, if there is too little memory for it."""
        try:
            return run()
        except torch.OutOfMemoryError:
            self.bank.shrink()
            self.runner.release()
        return run()

    def enter(self, ticket: Ticket, images: Sequence[int]) -> Batch:
        """Start the rows of these images, or let them go on where they were parked; those that run are left alone."""
        here = self._batches.get(ticket.bucket)
        away = [image for image in images if here is None or (ticket, image) not in here.owners]
        parked = [image for image in away if (ticket, image) in self.bank]
        fresh = [image for image in away if (ticket, image) not in self.bank]
        if fresh:
            self.with_room(lambda: self._start(ticket, fresh))
        for image in parked:
            self.with_room(lambda image=image: self._resume(ticket, image))
        return self._batches[ticket.bucket]

    def park(self, row: Row, keep_prepared: bool = True) -> None:
        """Set a row aside; one that does not run stays where it is.

        keep_prepared: also what can be computed again, if there is room for it.
        """
        bucket = row[0].bucket
        batch = self._batches.get(bucket)
        if batch is None or row not in batch.owners:
            return
        position = batch.owners.index(row)
        try:
            saved = batch.save(position, keep_prepared)
        except torch.OutOfMemoryError:
            saved = self.with_room(lambda: batch.save(position, keep_prepared=False))
        self.bank.put(row, saved)
        self.leave(bucket, [position])

    def leave(self, bucket: Hashable, positions: Sequence[int]) -> None:
        """Take rows out of their batch."""
        batch = self._batches[bucket]
        batch.leave(positions)
        if not len(batch):
            del self._batches[bucket]
            self.runner.retire(bucket, batch)

    def remove(self, rows: set[Row]) -> None:
        """Forget rows, wherever they are."""
        for row in rows:
            self.bank.remove(row)
        for bucket, batch in list(self._batches.items()):
            positions = [position for position, owner in enumerate(batch.owners) if owner in rows]
            if positions:
                self.leave(bucket, positions)

    def _start(self, ticket: Ticket, images: Sequence[int]) -> None:
        assert ticket.conditioning is not None
        new = pipeline.start(self.parts, ticket.settled, ticket.conditioning, images)
        self._put(ticket.bucket, lambda batch: batch.join(new, [(ticket, image) for image in images]))

    def _resume(self, ticket: Ticket, image: int) -> None:
        assert ticket.conditioning is not None
        saved = self.bank[ticket, image]
        prepared = saved.prepared
        if prepared is None:
            prepared = pipeline.prepare(self.parts, ticket.settled, ticket.conditioning, [image])
        self._put(ticket.bucket, lambda batch: batch.restore(saved, prepared))
        self.bank.remove((ticket, image))

    def _put(self, bucket: Hashable, enter: Callable[[Batch], None]) -> None:
        batch = self._batches.get(bucket)
        if batch is None:
            batch = self.runner.batch(bucket)
        try:
            enter(batch)
            self._batches[bucket] = batch
        finally:
            if not len(batch):
                self.runner.retire(bucket, batch)
