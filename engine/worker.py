"""The one thread that runs everything: it encodes, lets rows join, updates, takes them out, decodes, hands over."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch

from . import pipeline
from .adapters import Changes
from .batch import Batch
from .batches import Batches
from .bookings import Bookings
from .errors import Cancelled, DeadlineMissed, EngineClosed, NumericsError, RequestError
from .model import Model
from .pacing import Pace
from .request import Event
from .results import make_result, preview_of
from .runner import Before, out_of_memory
from .scheduler import Scheduler
from .scheduling.costs import MeasuredCosts
from .ticket import Bucket, Row, Ticket
from .upscaling.upscaler import Upscaler

logger = logging.getLogger("stepfuse")


class Worker:
    """Runs the rows of all models. `submit` and `close` may be called from any thread.

    models: by name, None the default, whose configuration holds for all of them; others may come later.
    """

    def __init__(self, models: Mapping[str | None, Model]) -> None:
        self._models, config = models, models[None].parts.config
        self.device = config.device
        self.batches = Batches(models, config.parked_bytes)
        self._costs = MeasuredCosts(_pixels, kind=_network)
        self._pace = Pace(config.device, self._costs.note)
        self.scheduler: Scheduler[Row] = Scheduler(
            config.max_rows,
            cost=self._cost,
            cap=lambda bucket: self._models[_bucket(bucket).model].cap(bucket),
            queue_seconds=config.queue_seconds,
            clock=time.perf_counter,
        )
        self.bookings = Bookings(self.scheduler)
        self.inbox: list[Ticket] = []
        self.changes = Changes()
        self.cancelled: deque[Ticket] = deque()
        self._news = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="stepfuse-engine", daemon=True)
        self._thread.start()

    def submit(self, tickets: Sequence[Ticket]) -> None:
        """Queue jobs, all or none; what follows as later stages counts as work now. Raises QueueFull, EngineClosed."""
        for ticket in tickets:
            ticket.job.on_cancel = partial(self.cancelled.append, ticket)
        with self._news:
            if self._closed:
                raise EngineClosed("the engine is closed; load a new one")
            self.bookings.take([one for ticket in tickets for one in ticket.line])
            if not self.changes.hold(tickets):
                self.inbox += tickets
            self._news.notify_all()

    def in_turn(self, make: Callable[[], None]) -> None:
        """Run something on the thread after all jobs that were submitted before it, and before those submitted after
        it; returns once it has run. Raises what it raises, EngineClosed, RequestError on the thread itself.
        """
        if threading.current_thread() is self._thread:
            raise RequestError("adapters cannot be changed from a callback of the engine, which would wait for itself")
        with self._news:
            if self._closed:
                raise EngineClosed("the engine is closed; load a new one")
            made = self.changes.add(make)
            self._news.notify_all()
        made.result()

    def close(self) -> None:
        """Cancel what is queued or running and end the thread. Safe to call twice."""
        with self._news:
            self._closed = True
            self._news.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _cost(self, bucket: Hashable, model_rows: int) -> float:
        """Seconds of an update: as calibrated where its size was, else as the updates so far took."""
        model = self._models[_bucket(bucket).model]
        return (model.runner.calibration.cost if model.calibrated(bucket) else self._costs)(bucket, model_rows)

    # The thread itself. Everything below runs on it.

    @torch.inference_mode()
    def _serve(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        ended = EngineClosed("the engine was closed")
        try:
            while self._wait():
                self._change()
                self._receive()
                self._drop()
                self._park(row for row, _ in self.scheduler.preempt())
                self._admit()
                self._advance()
        except Exception as error:  # boundary: nobody is left waiting for a thread that has ended
            logger.exception("the engine's thread ended")
            ended = EngineClosed(f"the engine ended by {type(error).__name__}: {error}; load a new one")
            ended.__cause__ = error
        self._end(ended)

    def _end(self, error: EngineClosed) -> None:
        """End everything that is queued or running."""
        with self._news:
            self._closed = True
        left = {*self.inbox, *self.changes.end(error), *(ticket for ticket, _ in self.scheduler.rows())}
        for ticket in left:  # before their rows are taken out, which a device that failed may not do
            ticket.job.finish(ticket.named(error))
        self._fail(left, error)

    def _wait(self) -> bool:
        """Sleep until there is work; False once the engine is closed."""
        with self._news:
            self._news.wait_for(lambda: self._closed or self.inbox or len(self.changes) or len(self.scheduler))
            return not self._closed

    def _change(self) -> None:
        """Make the changes of adapters whose turn it is, and let in the jobs that waited for them."""
        while len(self.changes) and not self.inbox and not len(self.scheduler):
            self.changes.first().run()
            with self._news:
                self.inbox += self.changes.pop()

    def _receive(self) -> None:
        """Encode the prompts of all new jobs in one batch and queue their rows."""
        with self._news:
            fresh, self.inbox = self.inbox, []
        wanted = [ticket for ticket in fresh if not ticket.job.done and not self._drop_cancelled(ticket)]
        for model in dict.fromkeys(ticket.model for ticket in wanted):
            self._queue(model, [ticket for ticket in wanted if ticket.model is model])
        with self._news:
            self.bookings.settle(fresh)

    def _queue(self, model: Model, fresh: list[Ticket]) -> None:
        began = time.perf_counter()
        try:
            encoded = self.batches.with_room(lambda: pipeline.encode(model.parts, [one.settled for one in fresh]))
        except Exception as error:  # boundary: a failed encode ends its own job
            if len(fresh) == 1:
                self._fail(fresh, error)
            for ticket in fresh if len(fresh) > 1 else ():
                self._queue(model, [ticket])
            return
        for ticket, (conditioning, cut) in zip(fresh, encoded, strict=True):
            ticket.conditioning, ticket.warnings = conditioning, ticket.settled.warnings + cut
            ticket.timings["encode"] = time.perf_counter() - began
            self.scheduler.add_request(
                ticket.rows,
                ticket.bucket,
                updates=ticket.updates,
                weight=ticket.settled.branches,
                deadline=ticket.deadline,
                since=ticket.line[0].submitted,
                client=ticket.settled.request.client,
                accepted=True,
            )
            for warning in ticket.warnings:
                logger.warning(warning)

    def _drop(self) -> None:
        """End jobs that were cancelled, and those whose deadline passed before they started."""
        while self.cancelled:
            ticket = self.cancelled.popleft()
            if not ticket.job.done:
                self._drop_cancelled(ticket)
        for ticket in {ticket for ticket, _ in self.scheduler.expire(lambda row: row[0].begun)}:
            wanted = ticket.settled.request.deadline
            self._fail([ticket], DeadlineMissed(f"deadline: the request did not start within {wanted} s"))

    def _admit(self) -> None:
        """Let waiting and parked rows join the running batch of their bucket while there is room."""
        joining: dict[Ticket, list[int]] = {}
        for (ticket, index), _ in self.scheduler.admit():
            joining.setdefault(ticket, []).append(index)
        parked: set[Row] = set()
        for ticket, indices in joining.items():
            try:
                here = [index for index in indices if (ticket, index) not in parked and not ticket.job.done]
                parked |= self._enter(ticket, here)
            except torch.OutOfMemoryError as error:
                self._fail([ticket], out_of_memory(ticket.model.parts.config, max(len(indices), ticket.warm), error))
            except Exception as error:  # boundary: as in _queue
                self._fail([ticket], error)

    def _enter(self, ticket: Ticket, indices: list[int]) -> set[Row]:
        """Put rows into their batch; the rows of any job that had to be parked because memory was short."""
        parked: set[Row] = set()
        while indices:
            ticket.timings.setdefault("began", time.perf_counter())
            try:
                batch = self.batches.enter(ticket, indices)
                if ticket.warm:
                    ticket.model.runner.warm(batch, ticket.warm)
                if ticket.calibrate is not None:
                    ticket.model.runner.calibrate(batch, ticket.warm, **ticket.calibrate)
                break
            except torch.OutOfMemoryError:
                smaller = [] if ticket.warm else self.scheduler.shrink(ticket.bucket)
                if not smaller:
                    raise
                self._park(smaller, keep_prepared=False)
                parked |= set(smaller)
                indices = [index for index in indices if (ticket, index) not in parked]
        return parked

    def _park(self, rows: Iterable[Row], keep_prepared: bool = True) -> None:
        """Set rows aside that the scheduler has parked."""
        for row in rows:
            try:
                self.batches.park(row, keep_prepared)
            except torch.OutOfMemoryError as error:
                self._fail([row[0]], out_of_memory(row[0].model.parts.config, 1, error))

    def _advance(self) -> None:
        """One update of the batch whose turn it is; finished and cancelled rows leave it."""
        picked = self.scheduler.pick()
        if picked is None:
            return
        bucket = _bucket(picked)
        batch, model = self.batches[bucket], self._models[bucket.model]
        counts = Counter(row[0] for row in batch.owners)
        tickets = list(counts)
        preview = any(ticket.wants_preview(rows) for ticket, rows in counts.items())
        self._pace.begin()
        try:
            before = self.batches.with_room(lambda: model.runner.update(batch, preview))
        except torch.OutOfMemoryError as error:
            parked = self.scheduler.shrink(bucket)
            self._park(parked, keep_prepared=False)
            if not parked:
                self._fail(tickets, out_of_memory(model.parts.config, len(batch), error))
        except Exception as error:  # boundary: a failed update ends its jobs, not the engine
            self._fail(tickets, error)
        else:
            self._pace.end(bucket, batch.model_rows)
            for ticket, index in batch.owners:
                ticket.done[index] = ticket.done.get(index, 0) + 1
            failed = [(ticket, error) for ticket in tickets if (error := self._report(ticket, batch, before))]
            for ticket, error in failed:  # only now: the rows of those that stay may move
                self._fail([ticket], error)
            self._collect(bucket, batch)

    def _report(self, ticket: Ticket, batch: Batch, before: Before | None) -> Exception | None:
        """Send the event of an update; the error if its preview could not be made."""
        preview = None
        if before is not None and ticket.wants_preview():
            rows = sorted((owner[1], i) for i, owner in enumerate(batch.owners) if owner[0] is ticket)
            try:
                latents = before.denoised([position for _, position in rows])
                images = pipeline.decode(ticket.model.parts, latents)
                preview = preview_of(ticket.model.parts, images, ticket.settled.request.prompt)
            except Exception as error:  # boundary: a failed preview ends its own job
                return error
        update, total = ticket.overall()
        ticket.job.report(Event(update=update, total=total, preview=preview))
        return None

    def _collect(self, bucket: Bucket, batch: Batch) -> None:
        """Take finished rows out of the batch; end the jobs that have all their rows."""
        gone = [i for i, (ticket, index) in enumerate(batch.owners) if ticket.done[index] >= ticket.updates]
        if not gone:
            return
        latents, bad = self.batches.with_room(lambda: batch.take(gone))
        ended = [batch.owners[position] for position in gone]
        for (ticket, index), own, broken in zip(ended, latents, bad, strict=True):
            ticket.latents[index] = own
            ticket.bad |= broken
        self.scheduler.remove(ended)
        self.batches.leave(bucket, gone)
        tickets = list(dict.fromkeys(ticket for ticket, _ in ended))
        config = self._models[bucket.model].parts.config
        dtype = str(config.dtype).removeprefix("torch.")
        hint = "a lower guidance_scale" if dtype == "float32" else "dtype='float32'"
        self._fail(
            [ticket for ticket in tickets if ticket.bad],
            NumericsError(f"NaN or Inf in the latents ({dtype}); try {hint}"),
        )
        ready = [ticket for ticket in tickets if ticket.complete and not ticket.bad]
        together = 1 if config.decode_rows == 1 else max(1, len(ready))
        for size in dict.fromkeys(ticket.size for ticket in ready):
            alike = [ticket for ticket in ready if ticket.size == size]
            for first in range(0, len(alike), together):
                self._finish(alike[first : first + together])

    def _finish(self, tickets: list[Ticket]) -> None:
        """Decode jobs of one bucket that ended with the same update together, and hand over their results."""
        tickets = [ticket for ticket in tickets if not self._drop_cancelled(ticket)]
        if not tickets:
            return
        began, parts = time.perf_counter(), tickets[0].model.parts
        wanted = [ticket.settled.request.output != "latent" for ticket in tickets]
        try:
            latents = self.batches.with_room(lambda: [ticket.stacked() for ticket in tickets])
            images = self.batches.with_room(lambda: pipeline.decode_each(parts, latents, wanted))
        except Exception as error:  # boundary: a failed decode ends its own job
            if len(tickets) == 1:
                self._fail(tickets, error)
            for ticket in tickets if len(tickets) > 1 else ():
                self._finish([ticket])
            return
        decoded = time.perf_counter()
        for ticket, own, pictures in zip(tickets, latents, images, strict=True):
            try:
                if pictures is not None and ticket.upscaler is not None:
                    pictures = self._enlarge(ticket, ticket.upscaler, pictures)
                spent = ticket.spent(began, decoded if ticket.upscaler is None else time.perf_counter())
                result = make_result(parts, ticket.asked, own, pictures, spent, ticket.warnings)
                result = replace(result, settings=ticket.model.said(result.settings))
                if ticket.relay is not None:
                    if (following := ticket.relay.follow(result, own, pictures)) is not None:
                        with self._news:
                            self.inbox.append(following)
                        continue
                    result = ticket.relay.combined(time.perf_counter())
            except Exception as error:  # boundary: a failed safety hook, or next stage, ends its own job
                self._fail([ticket], error)
                continue
            _, total = ticket.overall()
            ticket.job.report(Event(update=total, total=total, result=result))
            ticket.job.finish(result)

    def _enlarge(self, ticket: Ticket, upscaler: Upscaler, pictures: torch.Tensor) -> torch.Tensor:
        return self.batches.with_room(lambda: pipeline.enlarge(ticket.model.parts, upscaler, pictures))

    def _drop_cancelled(self, ticket: Ticket) -> bool:
        if ticket.job.cancelled:
            self._fail([ticket], Cancelled("the job was cancelled"))
        return ticket.job.cancelled

    def _fail(self, tickets: Sequence[Ticket] | set[Ticket], error: BaseException) -> None:
        """End jobs with an error and take their rows out of everything."""
        for ticket in tickets:
            if isinstance(error, torch.OutOfMemoryError):
                error = out_of_memory(ticket.model.parts.config, len(ticket.rows), error)
            line = ticket.line
            rows = {row for one in line for row in one.rows}
            self.scheduler.remove(rows)
            self.batches.remove(rows)
            with self._news:
                self.bookings.settle(line)
            ticket.job.finish(ticket.named(error))


def _bucket(bucket: Hashable) -> Bucket:
    assert isinstance(bucket, Bucket), bucket
    return bucket


def _pixels(bucket: Hashable) -> int:
    return _bucket(bucket).height * _bucket(bucket).width


def _network(bucket: Hashable) -> Hashable:
    """What updates of the bucket run through."""
    return _bucket(bucket).model, _bucket(bucket).controls, _bucket(bucket).loras
