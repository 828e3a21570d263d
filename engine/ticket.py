"""What the engine knows about one job while it runs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from .models.unet import Conditioning
from .request import Job
from .settling import Settled


class Bucket(NamedTuple):
    """Rows with equal buckets can share a forward: size in pixels, tokens of the prompt, whether it is masked, the
    ControlNets, and the model.
    """

    height: int
    width: int
    tokens: int | None
    masked: bool
    controls: tuple[str, ...] = ()
    model: str | None = None


@dataclass(eq=False)
class Ticket:
    """Engine-side state of one job; row i of it is image i.

    done: updates of every row that has started; latents: of the rows that have ended; bad: NaN or Inf was seen in them;
    warm: rows to make ready for, where the job only warms up; calibrate: how to measure them, too.
    """

    job: Job
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

    @property
    def updates(self) -> int:
        """Network evaluations of one row."""
        return len(self.settled.plan.updates)

    @property
    def deadline(self) -> float | None:
        """When it must have started, a time of `perf_counter`."""
        wanted = self.settled.request.deadline
        return None if wanted is None else self.submitted + wanted

    @property
    def begun(self) -> bool:
        """Whether a row of it has started."""
        return "began" in self.timings

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
        return Bucket(self.settled.height, self.settled.width, tokens, masked)

    @property
    def complete(self) -> bool:
        """Whether all rows have ended."""
        return len(self.latents) == len(self.settled.seeds)

    def progress(self, coming: int = 0) -> int:
        """Updates the job has seen, its rows' average; `coming`: row updates that are about to be added."""
        return (sum(self.done.values()) + coming) // len(self.settled.seeds)

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
        """Final latents of all rows [n, C, h, w], in order."""
        return torch.stack([self.latents[index] for index in range(len(self.latents))])


Row = tuple[Ticket, int]
