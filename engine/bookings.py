"""Work that was accepted and is not in the scheduler yet; it counts against the bound of the queue."""

from __future__ import annotations

from collections.abc import Sequence

from .scheduler import Scheduler
from .ticket import Row, Ticket


class Bookings:
    """For one caller at a time."""

    def __init__(self, scheduler: Scheduler[Row]) -> None:
        self._scheduler = scheduler
        self._ahead: dict[Ticket, float] = {}
        self._buckets: dict[tuple[object, ...], tuple[object, ...]] = {}

    def __len__(self) -> int:
        return len(self._ahead)

    def take(self, tickets: Sequence[Ticket]) -> None:
        """Book new requests, all or none. Raises QueueFull."""
        prices = {ticket: self._price(ticket) for ticket in tickets}
        self._scheduler.check(sum(prices.values()), sum(self._ahead.values()))
        self._ahead |= prices

    def settle(self, tickets: Sequence[Ticket]) -> None:
        """The requests are in the scheduler, or have failed; unknown ones are ignored."""
        for ticket in tickets:
            self._ahead.pop(ticket, None)
            if ticket.conditioning is not None:
                self._buckets[_shape(ticket)] = ticket.bucket

    def _price(self, ticket: Ticket) -> float:
        """Estimated device-seconds of a request; before its text is encoded, its bucket is taken from its size."""
        settled = ticket.settled
        bucket = self._buckets.get(_shape(ticket), ticket.bucket)
        return self._scheduler.price(bucket, ticket.updates, len(settled.seeds) * settled.branches)


def _shape(ticket: Ticket) -> tuple[object, ...]:
    return ticket.model.name, ticket.settled.control_names, ticket.settled.height, ticket.settled.width
