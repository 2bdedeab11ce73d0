"""The line of tickets in front of the device: bounded, first come first served, equal shapes painted at once."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from gguf_sd.batching import same_shape
from gguf_sd.request import Job
from gguf_sd.server.tickets import QueueFullError, ShuttingDownError, Ticket

FIRST_GUESS = 2e-7  # seconds a pixel and step, until some were measured
NEWEST = 0.3  # weight of the newest measurement


@dataclass(frozen=True)
class Part:
    """One picture of a ticket."""

    ticket: Ticket
    index: int

    @property
    def job(self) -> Job:
        return self.ticket.jobs[self.index]


class Line:
    """Tickets in the order in which they came; those that are painted stay in it until they are over."""

    def __init__(self, limit: int, batch: int):
        """``limit``: tickets that may wait; ``batch``: pictures painted at once."""
        self.limit, self.batch, self.closed = limit, batch, False
        self.pace = FIRST_GUESS
        self._tickets: list[Ticket] = []
        self._change = threading.Condition()

    def submit(self, ticket: Ticket) -> None:
        """Raises QueueFullError where as many wait as may, and ShuttingDownError after :meth:`close`."""
        with self._change:
            self.check_room()
            self._tickets.append(ticket)
            self._change.notify()

    def check_room(self) -> None:
        """Raises what :meth:`submit` would raise now."""
        with self._change:
            if self.closed:
                raise ShuttingDownError
            if (waiting := len(self._waiting())) >= self.limit:
                raise QueueFullError(waiting, self._seconds(self.open_tickets()))

    def open_tickets(self) -> list[Ticket]:
        """Those that are not over, in order."""
        with self._change:
            self._tickets = [ticket for ticket in self._tickets if not ticket.over]
            return list(self._tickets)

    def waiting(self) -> int:
        with self._change:
            return len(self._waiting())

    def ahead(self, ticket: Ticket) -> int:
        """How many tickets are served before this one."""
        tickets = self.open_tickets()
        return tickets.index(ticket) if ticket in tickets else 0

    def seconds_left(self, ticket: Ticket) -> float:
        """Until the ticket's last picture, by the pace so far: its own work, and that of those before it."""
        tickets = self.open_tickets()
        until = tickets[: tickets.index(ticket) + 1] if ticket in tickets else [ticket]
        return self.pace * sum(one.work for one in until)

    def measured(self, seconds: float, work: float) -> None:
        """Learns the pace from some work, in pixels times steps."""
        if work > 0:
            first = self.pace == FIRST_GUESS
            self.pace = seconds / work if first else (1 - NEWEST) * self.pace + NEWEST * seconds / work

    def take(self) -> list[Part] | None:
        """Waits for work: pictures to paint at once, begun; None once the line is closed."""
        with self._change:
            while True:
                if self.closed:
                    return None
                if parts := self._next():
                    break
                self._change.wait()
            for ticket in {part.ticket: None for part in parts}:
                ticket.begin([part.index for part in parts if part.ticket is ticket])
        return parts

    def close(self) -> list[Ticket]:
        """Takes no more tickets; who waits for one that nobody has begun is told. What is painted goes on. Returns
        the tickets that are being painted, which get no pictures but those begun."""
        with self._change:
            self.closed = True
            self._change.notify_all()
            tickets = self.open_tickets()
        for ticket in tickets:
            if not ticket.running:
                ticket.fail(str(ShuttingDownError()))
        return [ticket for ticket in tickets if not ticket.over]

    def _waiting(self) -> list[Ticket]:
        return [ticket for ticket in self.open_tickets() if not ticket.started]

    def _seconds(self, tickets: Sequence[Ticket]) -> int:
        return max(1, min(600, math.ceil(self.pace * sum(ticket.work for ticket in tickets))))

    def _next(self) -> list[Part]:
        parts = [Part(ticket, index) for ticket in self.open_tickets() for index in ticket.unbegun]
        return [part for part in parts if _together(parts[0], part)][: self.batch]


def _together(a: Part, b: Part) -> bool:
    if a.ticket is not b.ticket and (a.ticket.model, a.ticket.chunks) != (b.ticket.model, b.ticket.chunks):
        return False
    return same_shape(a.job, b.job)
