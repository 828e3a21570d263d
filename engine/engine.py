"""The Engine: requests in from any thread, one worker thread that runs rows update by update, results out."""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import env, pipeline
from .batch import Batch
from .components import Components, load_components
from .config import EngineConfig, merge
from .errors import Cancelled, EngineClosed, NumericsError, RequestError
from .images import to_uint8
from .models.unet import Conditioning
from .request import Event, Job, Request, build_request
from .results import make_result, to_arrays
from .runner import Before, EagerRunner
from .scheduler import Scheduler
from .settling import Settled, settle

logger = logging.getLogger("stepfuse")


@dataclass(eq=False)
class Ticket:
    """Engine-side state of one job; row i of it is image i."""

    job: Job
    settled: Settled
    submitted: float = field(default_factory=time.perf_counter)
    conditioning: Conditioning | None = None
    warnings: tuple[str, ...] = ()
    done: dict[int, int] = field(default_factory=dict)
    latents: dict[int, torch.Tensor] = field(default_factory=dict)
    bad: bool = False
    timings: dict[str, float] = field(default_factory=dict)

    @property
    def updates(self) -> int:
        """Network evaluations of one row."""
        return len(self.settled.plan.updates)

    @property
    def rows(self) -> list[Row]:
        """Ids of all rows."""
        return [(self, index) for index in range(len(self.settled.seeds))]

    @property
    def bucket(self) -> tuple[Any, ...]:
        """Rows with equal buckets can share a forward: size in pixels and text length."""
        hidden = None if self.conditioning is None else self.conditioning.hidden
        return self.settled.height, self.settled.width, None if hidden is None else hidden.shape[1]


Row = tuple[Ticket, int]


class Engine:
    """Runs one checkpoint. Safe to use from several threads; use it as a context manager, or call close()."""

    def __init__(self, components: Components) -> None:
        self.components = components
        self._runner = EagerRunner(components)
        self._scheduler: Scheduler[Row] = Scheduler(components.config.max_rows)
        self._batches: dict[Any, Batch] = {}
        self._inbox: list[Ticket] = []
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

        preview_every = k attaches a decoded estimate to every k-th event.
        """
        return self._submit([build_request(request, fields)], preview_every)[0]

    def stream(self, request: str | Request | None = None, *, preview_every: int = 0, **fields: Any) -> Iterator[Event]:
        """Yield an Event per update; the last one carries the result. Closing the iterator cancels the request."""
        job = self.submit(request, preview_every=preview_every, **fields)
        try:
            yield from job.events()
        finally:
            job.cancel()

    def warmup(self, width: int | None = None, height: int | None = None) -> None:
        """Run one update and one decode at a size, so that the first request does not pay for first-use costs."""
        prompt = None if self.components.family.text == "none" else ""
        labels = 0 if self.components.denoiser.config.class_embedding != "none" else None
        self.generate(prompt, width=width, height=height, steps=1, seed=0, class_labels=labels)

    def explain(self) -> str:
        """What was loaded, on what, and which implementation every op uses and why."""
        sampler = "\n".join(f"  {line}" for line in self._runner.binder.explain().splitlines())
        return f"{self.components.explain()}\nsampler:\n{sampler}"

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

    def _submit(self, requests: Sequence[Request], preview_every: int) -> list[Job]:
        if not isinstance(preview_every, int) or preview_every < 0:
            raise RequestError(f"preview_every: got {preview_every!r}, expected a whole number >= 0")
        tickets = [Ticket(Job(request, preview_every), settle(self.components, request)) for request in requests]
        with self._news:
            if self._closed:
                raise EngineClosed("the engine is closed; load a new one")
            self._inbox += tickets
            self._news.notify_all()
        return [ticket.job for ticket in tickets]

    # The worker thread. Everything below runs on it.

    @torch.inference_mode()
    def _serve(self) -> None:
        while self._wait():
            self._receive()
            self._admit()
            self._advance()
        self._fail(
            {row[0] for batch in self._batches.values() for row in batch.owners}, EngineClosed("the engine was closed")
        )

    def _wait(self) -> bool:
        """Sleep until there is work; False once the engine is closed."""
        with self._news:
            self._news.wait_for(lambda: self._closed or self._inbox or len(self._scheduler))
            if self._closed:
                waiting = [*self._inbox, *{row[0] for row in self._scheduler.rows()}]
                self._fail(waiting, EngineClosed("the engine was closed"))
            return not self._closed

    def _receive(self) -> None:
        """Encode the prompts of all new jobs in one batch and queue their rows."""
        with self._news:
            fresh, self._inbox = self._inbox, []
        fresh = [ticket for ticket in fresh if not self._drop_cancelled(ticket)]
        if not fresh:
            return
        began = time.perf_counter()
        try:
            encoded = pipeline.encode(self.components, [ticket.settled for ticket in fresh])
        except Exception as error:  # boundary: a failed encode ends its jobs, not the engine
            self._fail(fresh, error)
            return
        for ticket, (conditioning, cut) in zip(fresh, encoded, strict=True):
            ticket.conditioning, ticket.warnings = conditioning, ticket.settled.warnings + cut
            ticket.timings["encode"] = time.perf_counter() - began
            for row in ticket.rows:
                self._scheduler.add(row, ticket.bucket)
            for warning in ticket.warnings:
                logger.warning(warning)

    def _admit(self) -> None:
        """Let waiting rows join the running batch of their bucket while there is room."""
        joining: dict[Ticket, list[int]] = {}
        for (ticket, index), _ in self._scheduler.admit():
            joining.setdefault(ticket, []).append(index)
        for ticket, indices in joining.items():
            assert ticket.conditioning is not None
            ticket.timings.setdefault("began", time.perf_counter())
            try:
                rows = pipeline.start(
                    self.components, ticket.settled, ticket.conditioning, indices, [(ticket, i) for i in indices]
                )
            except Exception as error:  # boundary: as in _receive
                self._fail([ticket], error)
                continue
            running = self._batches.get(ticket.bucket)
            self._batches[ticket.bucket] = rows if running is None else running.join(rows)

    def _advance(self) -> None:
        """One update of the batch whose turn it is; finished and cancelled rows leave it."""
        bucket = self._scheduler.pick()
        if bucket is None:
            return
        batch = self._batches[bucket]
        tickets = list(dict.fromkeys(row[0] for row in batch.owners))
        if any(self._drop_cancelled(ticket) for ticket in tickets):
            return
        try:
            before = self._runner.update(batch)
            for ticket, index in batch.owners:
                ticket.done[index] = ticket.done.get(index, 0) + 1
            for ticket in tickets:
                self._report(ticket, batch, before)
            self._collect(bucket, batch)
        except Exception as error:  # boundary: a failed update ends its jobs, not the engine
            self._fail(tickets, error)

    def _report(self, ticket: Ticket, batch: Batch, before: Before) -> None:
        update = sum(ticket.done.values()) // len(ticket.settled.seeds)
        every = ticket.job.preview_every
        preview = None
        if every and update % every == 0:
            rows = [i for i, owner in enumerate(batch.owners) if owner[0] is ticket]
            preview = to_uint8(to_arrays(pipeline.decode(self.components, before.denoised(rows))))
        ticket.job.report(Event(update=update, total=ticket.updates, preview=preview))

    def _collect(self, bucket: Any, batch: Batch) -> None:
        """Take finished rows out of the batch; end the jobs that have all their rows."""
        stay, gone = [], []
        for position, (ticket, index) in enumerate(batch.owners):
            if ticket.done[index] < ticket.updates:
                stay.append(position)
            else:
                gone.append((ticket, index))
                ticket.latents[index] = batch.x[position]
                ticket.bad |= bool(batch.bad[position])
        if not gone:
            return
        self._leave(bucket, batch, stay, gone)
        for ticket in dict.fromkeys(ticket for ticket, _ in gone):
            if ticket.bad:
                dtype = str(self.components.config.dtype).removeprefix("torch.")
                hint = "a lower guidance_scale" if dtype == "float32" else "dtype='float32'"
                self._fail([ticket], NumericsError(f"NaN or Inf in the latents ({dtype}); try {hint}"))
            elif len(ticket.latents) == len(ticket.settled.seeds):
                try:
                    self._finish(ticket)
                except Exception as error:  # boundary: a failed decode or safety hook ends its own job
                    self._fail([ticket], error)

    def _leave(self, bucket: Any, batch: Batch, stay: list[int], gone: list[Row]) -> None:
        self._scheduler.remove(gone)
        if stay:
            self._batches[bucket] = batch.select(stay)
        else:
            del self._batches[bucket]

    def _finish(self, ticket: Ticket) -> None:
        """Decode and hand over the result."""
        if self._drop_cancelled(ticket):
            return
        timings = ticket.timings
        decoding = time.perf_counter()
        latents = torch.stack([ticket.latents[index] for index in range(len(ticket.latents))])
        images = None if ticket.settled.request.output == "latent" else pipeline.decode(self.components, latents)
        now = time.perf_counter()
        spent = {
            "encode": timings["encode"],
            "denoise": decoding - timings["began"],
            "decode": now - decoding,
            "total": now - ticket.submitted,
        }
        result = make_result(self.components, ticket.settled, latents, images, spent, ticket.warnings)
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
            for bucket, batch in list(self._batches.items()):
                stay = [position for position, owner in enumerate(batch.owners) if owner not in rows]
                if len(stay) < len(batch):
                    self._leave(bucket, batch, stay, [])
            ticket.job.finish(error)
