"""The Engine: requests in from any thread, one worker thread that runs rows update by update, results out."""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import env, pipeline
from .admission import Admission
from .batch import Batch
from .batches import Batches
from .components import Components, load_components
from .config import EngineConfig, merge
from .errors import Cancelled, DeadlineMissed, EngineClosed, NumericsError, RequestError
from .images import to_uint8
from .pacing import Pace
from .request import Event, Job, Request, build_request
from .results import make_result, to_arrays
from .runner import Before, Runner, out_of_memory
from .scheduler import Scheduler
from .scheduling.costs import MeasuredCosts
from .settling import settle
from .ticket import Row, Ticket

logger = logging.getLogger("stepfuse")


class Engine:
    """Runs one checkpoint. Safe to use from several threads; use it as a context manager, or call close()."""

    def __init__(self, components: Components, runner: Runner | None = None) -> None:
        """runner: how updates are executed; None: as the components' configuration says."""
        config = components.config
        self.components = components
        self._runner = runner or Runner(components)
        self._batches = Batches(components, self._runner)
        self._costs = MeasuredCosts(lambda bucket: bucket[0] * bucket[1])  # type: ignore[index]
        self._pace = Pace(config.device, self._costs.note)
        self._scheduler: Scheduler[Row] = Scheduler(
            config.max_rows,
            cost=self._cost,
            cap=self._runner.calibration.cap,
            queue_seconds=config.queue_seconds,
            clock=time.perf_counter,
        )
        self._admission = Admission(components, self._scheduler)
        self._inbox: list[Ticket] = []
        self._cancelled: deque[Ticket] = deque()
        self._news = threading.Condition()
        self._closed = False
        self._worker = threading.Thread(target=self._serve, name="stepfuse-engine", daemon=True)
        self._worker.start()
        atexit.register(self.close)  # a worker inside torch while the interpreter ends would abort the process

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        device: str | None = None,
        dtype: str | torch.dtype | None = None,
        config: EngineConfig | None = None,
        **overrides: Any,
    ) -> Engine:
        """Load a built-in model name ("shapes"), a diffusers folder, or a hub id org/name from the local cache.

        device and dtype default to CUDA with bf16 (fp16 below sm_80), else CPU with float32. `overrides` are fields of
        EngineConfig put over `config`. Raises CheckpointError, DeviceError or RequestError, before memory on the device
        is taken where the cause is a missing, extra or mis-shaped weight.
        """
        given = {"device": device, "dtype": dtype}
        merged = merge(config, overrides | {name: value for name, value in given.items() if value is not None})
        if (threads := env.num_threads()) is not None:
            torch.set_num_threads(threads)
        return cls(load_components(source, merged))

    def generate(
        self, prompt: str | Request | Sequence[str | Request] | None = None, **fields: Any
    ) -> Any:  # Result, or list[Result] for a list
        """Make images and wait for them: a Result for one prompt or Request, a list of Results for a list.

        `fields` are fields of Request, for every entry. Raises RequestError for bad values before anything runs.
        """
        if isinstance(prompt, (str, Request)) or prompt is None:
            return self.submit(prompt, **fields).result()
        jobs = self._submit([build_request(one, fields) for one in prompt], 0)
        try:
            return [job.result() for job in jobs]
        except BaseException:
            for job in jobs:
                job.cancel()
            raise

    def submit(self, request: str | Request | None = None, *, preview_every: int = 0, **fields: Any) -> Job:
        """Queue a request and return its Job at once.

        preview_every = k attaches a decoded estimate to every k-th event. Raises RequestError, MemoryBudgetError for a
        size that never fits, and QueueFull where the configured bound of the queue would be exceeded.
        """
        return self._submit([build_request(request, fields)], preview_every)[0]

    def stream(self, request: str | Request | None = None, *, preview_every: int = 0, **fields: Any) -> Iterator[Event]:
        """Yield an Event per update; the last one carries the result. Closing the iterator cancels the request."""
        job = self.submit(request, preview_every=preview_every, **fields)
        try:
            yield from job.events()
        finally:
            job.cancel()

    def warmup(
        self,
        width: int | None = None,
        height: int | None = None,
        *,
        rows: int | None = None,
        calibrate: bool = False,
        budget_s: float = 10.0,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        """Pay the first-use costs of a size now: one update, one decode, and every planned graph or compilation.

        rows: the most images that will run together, for runner="graph" and "compiled"; None: max_rows on CUDA, else 1.
        calibrate: also measure updates of up to `rows` images (None: max_rows); from then on that decides how many run
        together and in how many forwards. It is kept for later engines and printed by `explain`; other work waits.
        budget_s: no timing begins after so many seconds. progress: gets a line of text per timing, on another thread.
        Raises RequestError for a size or number of rows that cannot be run, and for calibrating in deterministic mode.
        """
        config = self.components.config
        rows = rows if rows is not None else config.max_rows if calibrate or config.device.type == "cuda" else 1
        if not isinstance(rows, int) or not 1 <= rows <= config.max_rows:
            raise RequestError(
                f"rows: got {rows!r}, expected 1 to max_rows, {config.max_rows}; load with more max_rows"
            )
        prompt = None if self.components.family.text == "none" else ""
        labels = 0 if self.components.denoiser.config.class_embedding != "none" else None
        request = Request(prompt=prompt, width=width, height=height, steps=1, seed=0, class_labels=labels)
        how = {"budget_s": budget_s, "progress": progress} if calibrate else None
        self._submit([request], 0, warm=rows, calibrate=how)[0].result()

    def explain(self) -> str:
        """What was loaded, on what, how updates are executed, and which implementation every op uses and why."""
        return f"{self.components.explain()}\n{self._runner.explain()}"

    def close(self) -> None:
        """Cancel what is queued or running and stop the worker. Safe to call twice."""
        with self._news:
            self._closed = True
            self._news.notify_all()
        if threading.current_thread() is not self._worker:
            self._worker.join()
        atexit.unregister(self.close)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _submit(self, requests: Sequence[Request], preview_every: int, **warm: Any) -> list[Job]:
        if not isinstance(preview_every, int) or preview_every < 0:
            raise RequestError(f"preview_every: got {preview_every!r}, expected a whole number >= 0")
        settled = [settle(self.components, request) for request in requests]
        tickets = [Ticket(Job(own.request, preview_every), own, **warm) for own in settled]
        for ticket in tickets:
            self._admission.fits(ticket.settled)
            ticket.job.on_cancel = partial(self._cancelled.append, ticket)
        with self._news:
            if self._closed:
                raise EngineClosed("the engine is closed; load a new one")
            self._admission.take(tickets)
            self._inbox += tickets
            self._news.notify_all()
        return [ticket.job for ticket in tickets]

    def _cost(self, bucket: Hashable, model_rows: int) -> float:
        """Seconds of an update: as calibrated where its size was, else as the updates so far took."""
        calibration = self._runner.calibration
        return (self._costs if calibration.cap(bucket) is None else calibration.cost)(bucket, model_rows)

    # The worker thread. Everything below runs on it.

    @torch.inference_mode()
    def _serve(self) -> None:
        if self.components.config.device.type == "cuda":
            torch.cuda.set_device(self.components.config.device)
        while self._wait():
            self._receive()
            self._drop()
            self._park(row for row, _ in self._scheduler.preempt())
            self._admit()
            self._advance()
        left = {*self._inbox, *(ticket for ticket, _ in self._scheduler.rows())}
        self._fail(left, EngineClosed("the engine was closed"))

    def _wait(self) -> bool:
        """Sleep until there is work; False once the engine is closed."""
        with self._news:
            self._news.wait_for(lambda: self._closed or self._inbox or len(self._scheduler))
            return not self._closed

    def _receive(self) -> None:
        """Encode the prompts of all new jobs in one batch and queue their rows."""
        with self._news:
            fresh, self._inbox = self._inbox, []
        wanted = [ticket for ticket in fresh if not self._drop_cancelled(ticket)]
        if wanted:
            self._queue(wanted)
        with self._news:
            self._admission.added(fresh)

    def _queue(self, fresh: list[Ticket]) -> None:
        began = time.perf_counter()
        try:
            encoded = pipeline.encode(self.components, [ticket.settled for ticket in fresh])
        except Exception as error:  # boundary: a failed encode ends its jobs, not the engine
            self._fail(fresh, error)
            return
        for ticket, (conditioning, cut) in zip(fresh, encoded, strict=True):
            ticket.conditioning, ticket.warnings = conditioning, ticket.settled.warnings + cut
            ticket.timings["encode"] = time.perf_counter() - began
            self._scheduler.add_request(
                ticket.rows,
                ticket.bucket,
                updates=ticket.updates,
                weight=ticket.settled.branches,
                deadline=ticket.deadline,
                client=ticket.settled.request.client,
                accepted=True,
            )
            for warning in ticket.warnings:
                logger.warning(warning)

    def _drop(self) -> None:
        """End jobs that were cancelled, and those whose deadline passed before they started."""
        while self._cancelled:
            ticket = self._cancelled.popleft()
            if not ticket.job.done:
                self._drop_cancelled(ticket)
        for ticket in {ticket for ticket, _ in self._scheduler.expire(lambda row: row[0].begun)}:
            wanted = ticket.settled.request.deadline
            self._fail([ticket], DeadlineMissed(f"deadline: the request did not start within {wanted} s"))

    def _admit(self) -> None:
        """Let waiting and parked rows join the running batch of their bucket while there is room."""
        joining: dict[Ticket, list[int]] = {}
        for (ticket, index), _ in self._scheduler.admit():
            joining.setdefault(ticket, []).append(index)
        parked: set[Row] = set()
        for ticket, indices in joining.items():
            try:
                here = [index for index in indices if (ticket, index) not in parked and not ticket.job.done]
                parked |= self._enter(ticket, here)
            except torch.OutOfMemoryError as error:
                self._fail([ticket], out_of_memory(self.components.config, max(len(indices), ticket.warm), error))
            except Exception as error:  # boundary: as in _queue
                self._fail([ticket], error)

    def _enter(self, ticket: Ticket, indices: list[int]) -> set[Row]:
        """Put rows into their batch; the rows of any job that had to be parked because memory was short."""
        parked: set[Row] = set()
        while indices:
            ticket.timings.setdefault("began", time.perf_counter())
            try:
                batch = self._batches.enter(ticket, indices)
                if ticket.warm:
                    self._runner.warm(batch, ticket.warm)
                if ticket.calibrate is not None:
                    self._runner.calibrate(batch, ticket.warm, **ticket.calibrate)
                break
            except torch.OutOfMemoryError:
                smaller = [] if ticket.warm else self._scheduler.shrink(ticket.bucket)
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
                self._batches.park(row, keep_prepared)
            except torch.OutOfMemoryError as error:
                self._fail([row[0]], out_of_memory(self.components.config, 1, error))

    def _advance(self) -> None:
        """One update of the batch whose turn it is; finished and cancelled rows leave it."""
        bucket = self._scheduler.pick()
        if bucket is None:
            return
        batch = self._batches[bucket]
        counts = Counter(row[0] for row in batch.owners)
        tickets = list(counts)
        preview = any(ticket.wants_preview(rows) for ticket, rows in counts.items())
        self._pace.begin()
        try:
            before = self._batches.with_room(lambda: self._runner.update(batch, preview))
        except torch.OutOfMemoryError as error:
            parked = self._scheduler.shrink(bucket)
            self._park(parked, keep_prepared=False)
            if not parked:
                self._fail(tickets, out_of_memory(self.components.config, len(batch), error))
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
                preview = to_uint8(to_arrays(pipeline.decode(self.components, latents)))
            except Exception as error:  # boundary: a failed preview ends its own job
                return error
        ticket.job.report(Event(update=ticket.progress(), total=ticket.updates, preview=preview))
        return None

    def _collect(self, bucket: Any, batch: Batch) -> None:
        """Take finished rows out of the batch; end the jobs that have all their rows."""
        gone = [i for i, (ticket, index) in enumerate(batch.owners) if ticket.done[index] >= ticket.updates]
        if not gone:
            return
        latents, bad = batch.take(gone)
        ended = [batch.owners[position] for position in gone]
        for (ticket, index), own, broken in zip(ended, latents, bad, strict=True):
            ticket.latents[index] = own
            ticket.bad |= broken
        self._scheduler.remove(ended)
        self._batches.leave(bucket, gone)
        tickets = list(dict.fromkeys(ticket for ticket, _ in ended))
        dtype = str(self.components.config.dtype).removeprefix("torch.")
        hint = "a lower guidance_scale" if dtype == "float32" else "dtype='float32'"
        self._fail(
            [ticket for ticket in tickets if ticket.bad],
            NumericsError(f"NaN or Inf in the latents ({dtype}); try {hint}"),
        )
        ready = [ticket for ticket in tickets if ticket.complete and not ticket.bad]
        together = 1 if self.components.config.decode_rows == 1 else max(1, len(ready))
        for first in range(0, len(ready), together):
            self._finish(ready[first : first + together])

    def _finish(self, tickets: list[Ticket]) -> None:
        """Decode jobs of one size that ended with the same update together, and hand over their results."""
        tickets = [ticket for ticket in tickets if not self._drop_cancelled(ticket)]
        if not tickets:
            return
        began = time.perf_counter()
        latents = [ticket.stacked() for ticket in tickets]
        wanted = [ticket.settled.request.output != "latent" for ticket in tickets]
        try:
            images = self._batches.with_room(lambda: pipeline.decode_each(self.components, latents, wanted))
        except Exception as error:  # boundary: a failed decode ends its own job
            if len(tickets) == 1:
                self._fail(tickets, error)
            for ticket in tickets if len(tickets) > 1 else ():
                self._finish([ticket])
            return
        decoded = time.perf_counter()
        for ticket, own, pictures in zip(tickets, latents, images, strict=True):
            try:
                spent = ticket.spent(began, decoded)
                result = make_result(self.components, ticket.settled, own, pictures, spent, ticket.warnings)
            except Exception as error:  # boundary: a failed safety hook ends its own job
                self._fail([ticket], error)
                continue
            ticket.job.report(Event(update=ticket.updates, total=ticket.updates, result=result))
            ticket.job.finish(result)

    def _drop_cancelled(self, ticket: Ticket) -> bool:
        if ticket.job.cancelled:
            self._fail([ticket], Cancelled("the job was cancelled"))
        return ticket.job.cancelled

    def _fail(self, tickets: Sequence[Ticket] | set[Ticket], error: BaseException) -> None:
        """End jobs with an error and take their rows out of everything."""
        for ticket in tickets:
            rows = set(ticket.rows)
            self._scheduler.remove(rows)
            self._batches.remove(rows)
            ticket.job.finish(error)
