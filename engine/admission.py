"""Whether the engine takes a request: it must fit the memory, and the work before it the bound of the queue."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..kernels.sampler_step.columns import Column
from .batch import WINDOW
from .components import Components
from .memory import Budget, RowSize, activation_bytes
from .models.unet import UNet
from .runtimes.networks import DenoiserNetwork
from .scheduler import Scheduler
from .settling import Settled
from .ticket import Row, Ticket


class Admission:
    """`fits` may be called from any thread; `take` and `added` by one at a time."""

    def __init__(self, parts: Components, scheduler: Scheduler[Row]) -> None:
        self._parts, self._scheduler = parts, scheduler
        limit = parts.config.memory_bytes or _free(parts.config.device)
        self._budget = None if limit == float("inf") else Budget(int(limit), headroom=0.0)
        self._columns = _columns(parts.denoiser)
        self._ahead: dict[Ticket, float] = {}
        self._buckets: dict[tuple[int, int], tuple[object, ...]] = {}

    def fits(self, settled: Settled) -> None:
        """Raise MemoryBudgetError for a request of which not even one row fits."""
        if self._budget is not None:
            self._budget.require(self.row(settled), settled.branches, settled.width, settled.height)

    def take(self, tickets: Sequence[Ticket]) -> None:
        """Book new requests, all or none. Raises QueueFull."""
        prices = {ticket: self._price(ticket) for ticket in tickets}
        self._scheduler.check(sum(prices.values()), sum(self._ahead.values()))
        self._ahead |= prices

    def added(self, tickets: Sequence[Ticket]) -> None:
        """The requests are in the scheduler, or have failed."""
        for ticket in tickets:
            self._ahead.pop(ticket, None)
            if ticket.conditioning is not None:
                self._buckets[ticket.settled.height, ticket.settled.width] = ticket.bucket

    def row(self, settled: Settled) -> RowSize:
        """The numbers that fix the bytes of a row of the request."""
        parts, net = self._parts, self._parts.denoiser.config
        height, width = settled.height // parts.scale, settled.width // parts.scale
        element, updates = torch.finfo(parts.config.dtype).bits // 8, len(settled.plan.updates)
        given = settled.request.prompt_embeds
        lengths = [encoder.length for encoder in parts.text]
        widths, layers = [level.channels for level in net.down], max(level.layers for level in net.down)
        return RowSize(
            channels=parts.channels,
            height=height,
            width=width,
            updates=WINDOW + (updates if updates > WINDOW else 0),
            columns=len(Column),
            tokens=max(lengths, default=0) if given is None else given.shape[1],
            prompt_columns=sum(self._columns[1:]),
            time_columns=self._columns[0],
            activations=activation_bytes(widths, layers, height, width, element),
            element=element,
            state=8 if parts.config.dtype == torch.float64 else 4,
        )

    def _price(self, ticket: Ticket) -> float:
        """Estimated device-seconds of a request; before its text is encoded, its bucket is taken from its size."""
        settled = ticket.settled
        bucket = self._buckets.get((settled.height, settled.width), ticket.bucket)
        return self._scheduler.price(bucket, ticket.updates, len(settled.seeds) * settled.branches)


def _columns(net: UNet | DenoiserNetwork) -> list[int]:
    """Widths of what a network prepares: of an update's time, then of a token of the prompt."""
    if isinstance(net, UNet):
        return [sum(net.get_parameter(name).shape[0] for name in stack) for stack in net.stacks()]
    return [1, net.config.blocks.cross_dim or 0]  # an exported network keeps the timestep and the prompt as they are


def _free(device: torch.device) -> int:
    """Bytes that could be allocated on a CUDA device now."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused
