"""The rows on the device: the running batch of every bucket, and the bank of rows that were set aside."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch

from . import pipeline
from .batch import Batch
from .model import Model
from .parking import Bank
from .ticket import Bucket, Row, Ticket

T = TypeVar("T")


class Batches:
    """Where rows are: in the batch of their bucket, in the bank, or nowhere (they have not started, or they ended).

    Only buckets with running rows have a batch here. models: by name, None the default; others may come later. parked:
    bytes that rows in the bank may hold.
    """

    def __init__(self, models: Mapping[str | None, Model], parked: int) -> None:
        self._models = models
        self.bank: Bank[Row] = Bank(parked)
        self._batches: dict[Bucket, Batch] = {}

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._batches.values())

    def __getitem__(self, bucket: Bucket) -> Batch:
        return self._batches[bucket]

    def with_room(self, run: Callable[[], T]) -> T:
        """run(), and once more after giving back what does not run, if there is too little memory for it."""
        try:
            return run()
        except torch.OutOfMemoryError:
            self.bank.shrink()
            for model in list(self._models.values()):  # a copy: another thread may add one
                model.runner.release()
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

    def leave(self, bucket: Bucket, positions: Sequence[int]) -> None:
        """Take rows out of their batch."""
        batch = self._batches[bucket]
        batch.leave(positions)
        if not len(batch):
            del self._batches[bucket]
            self._models[bucket.model].runner.retire(bucket, batch)

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
        new = pipeline.start(ticket.model.parts, ticket.settled, ticket.conditioning, images)
        self._put(ticket.bucket, lambda batch: batch.join(new, [(ticket, image) for image in images]))

    def _resume(self, ticket: Ticket, image: int) -> None:
        assert ticket.conditioning is not None
        saved = self.bank[ticket, image]
        prepared = saved.prepared
        if prepared is None:
            prepared = pipeline.prepare(ticket.model.parts, ticket.settled, ticket.conditioning, [image])
        self._put(ticket.bucket, lambda batch: batch.restore(saved, prepared))
        self.bank.remove((ticket, image))

    def _put(self, bucket: Bucket, enter: Callable[[Batch], None]) -> None:
        batch, runner = self._batches.get(bucket), self._models[bucket.model].runner
        if batch is None:
            batch = runner.batch(bucket, bucket.controls)
        try:
            enter(batch)
            self._batches[bucket] = batch
        finally:
            if not len(batch):
                runner.retire(bucket, batch)
