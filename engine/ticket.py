"""What the engine knows about one job while it runs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .errors import located
from .model import Model
from .models.tiles import Tiles
from .models.unet import Conditioning
from .request import Job
from .settling import Settled
from .upscaling.upscaler import Upscaler

if TYPE_CHECKING:
    from .relay import Relay


class Bucket(NamedTuple):
    """Rows with equal buckets can share a forward: size in pixels, tokens of the prompt, whether it is masked, the
    ControlNets, the model, and how many LoRAs a row has.
    """

    height: int
    width: int
    tokens: int | None
    masked: bool
    controls: tuple[str, ...] = ()
    model: str | None = None
    loras: int = 0


@dataclass(eq=False)
class Ticket:
    """Engine-side state of one job, or of one stage of a job that is a cascade; row i of it is image i, or tile i.

    model: what it runs on; done: updates of every row that has started; latents: of the rows that have ended; bad: NaN
    or Inf was seen in them; warm: rows to make ready for, where the job only warms up; calibrate: how to measure them,
    too. relay: the cascade it is a stage of; whole: the request its rows are together, where they are tiles. upscaler:
    what enlarges its images at the end.
    """

    job: Job
    model: Model
    settled: Settled
    warm: int = 0
    calibrate: Mapping[str, Any] | None = None
    submitted: float = field(default_factory=time.perf_counter)
    conditioning: Conditioning | None = None
    warnings: tuple[str, ...] = ()
    done: dict[int, int] = field(default_factory=dict)
    latents: dict[int, torch.Tensor] = field(default_factory=dict)
    bad: bool = False
    timings: dict[str, float] = field(default_factory=dict)
    relay: Relay | None = None
    stage: int = 0
    whole: Settled | None = None
    tiles: Tiles | None = None
    upscaler: Upscaler | None = None

    @property
    def updates(self) -> int:
        """Network evaluations of one row."""
        return len(self.settled.plan.updates)

    @property
    def deadline(self) -> float | None:
        """When it must have started, a time of `perf_counter`."""
        wanted = self.settled.request.deadline
        return None if wanted is None else self.line[0].submitted + wanted

    @property
    def begun(self) -> bool:
        """Whether a row of its job has started."""
        return self.stage > 0 or "began" in self.timings

    @property
    def line(self) -> list[Ticket]:
        """All tickets of its job, in order."""
        return [self] if self.relay is None else list(self.relay.tickets.values())

    @property
    def asked(self) -> Settled:
        """What was asked for: its rows, put together."""
        return self.whole or self.settled

    @property
    def rows(self) -> list[Row]:
        """Ids of all rows."""
        return [(self, index) for index in range(len(self.settled.seeds))]

    @property
    def bucket(self) -> Bucket:
        """Where its rows run."""
        hidden = None if self.conditioning is None else self.conditioning.hidden
        masked = self.conditioning is not None and self.conditioning.kv_len is not None
        tokens = None if hidden is None else hidden.shape[1]
        settled = self.settled
        chosen = settled.control_names, self.model.name, len(settled.loras)
        return Bucket(settled.height, settled.width, tokens, masked, *chosen)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels of its images."""
        return self.asked.height, self.asked.width

    @property
    def enlarged(self) -> float:
        """Sides of its images over those its model makes."""
        return 1.0 if self.upscaler is None else self.upscaler.scale

    @property
    def complete(self) -> bool:
        """Whether all rows have ended."""
        return len(self.latents) == len(self.settled.seeds)

    def progress(self, coming: int = 0) -> int:
        """Updates the job has seen, its rows' average; `coming`: row updates that are about to be added."""
        return (sum(self.done.values()) + coming) // len(self.settled.seeds)

    def overall(self) -> tuple[int, int]:
        """(updates done, all updates) of its job."""
        if self.relay is None:
            return self.progress(), self.updates
        return self.relay.before(self.stage) + self.progress(), self.relay.updates

    def proceed(self, settled: Settled, whole: Settled) -> None:
        """Its stage can start, with these rows."""
        self.settled, self.whole, self.submitted = settled, whole, time.perf_counter()

    def named(self, error: BaseException) -> BaseException:
        """The error with the stage of the cascade in which it came."""
        if self.relay is None:
            return error
        named = located(error, self.relay.where)
        named.__cause__ = error
        return named

    def wants_preview(self, coming: int = 0) -> bool:
        """Whether the event after these row updates carries a preview."""
        every = self.job.preview_every
        return every > 0 and self.progress(coming) % every == 0

    def spent(self, ended: float, decoded: float) -> dict[str, float]:
        """Seconds of each phase, for rows that ended and pictures that were decoded at these times."""
        return {
            "encode": self.timings["encode"],
            "denoise": ended - self.timings["began"],
            "decode": decoded - ended,
            "total": decoded - self.submitted,
        }

    def stacked(self) -> torch.Tensor:
        """Final latents of all images [n, C, h, w], in order; tiles are blended."""
        rows = torch.stack([self.latents[index] for index in range(len(self.latents))])
        return rows if self.tiles is None else self.tiles.blend(rows.unflatten(0, (-1, len(self.tiles))).unbind(1))


Row = tuple[Ticket, int]
