"""What owns the device: takes pictures from the line, has them painted, and hands them to their tickets."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from gguf_sd.errors import GgufSdError
from gguf_sd.server.line import Line, Part
from gguf_sd.server.shelf import Painter
from gguf_sd.server.tickets import Finished, Ticket

if TYPE_CHECKING:
    from gguf_sd.server.metrics import Metrics

log = logging.getLogger(__name__)


class _NotWantedError(Exception):
    """Nobody waits for these pictures any more."""


class Worker(threading.Thread):
    """One for each painter that works on its own: one for this machine's device, several for Ray's replicas."""

    def __init__(self, line: Line, painter: Painter, metrics: Metrics):
        super().__init__(name="painter", daemon=True)
        self.line, self.painter, self.metrics = line, painter, metrics
        self.halted = threading.Event()

    def halt(self) -> None:
        """Stops painting at the next step, whoever waits."""
        self.halted.set()

    def run(self) -> None:
        while (parts := self.line.take()) is not None:
            self._paint(parts)
            self.metrics.ended(_tickets(parts))
            if self.line.closed:
                for ticket in _tickets(parts):
                    ticket.fail("the server was shut down before all pictures were painted")

    def _paint(self, parts: Sequence[Part]) -> None:
        """What goes wrong with pictures together is tried with each alone: it fails for the one that causes it."""
        watch = _Watch(parts, self)
        try:
            self.painter.paint(parts[0].ticket.model, [part.job for part in parts], watch)
        except _NotWantedError:
            for ticket in _tickets(parts):
                if self.halted.is_set():
                    ticket.fail("the server was stopped")
        except Exception as error:
            left = [part for part in parts if part.index not in part.ticket.pictures and not part.ticket.over]
            if len(parts) > 1:
                for part in left:
                    self._paint([part])
                return
            for part in left:
                part.ticket.fail(self._sentence(error))
                self.metrics.failed()

    def _sentence(self, error: Exception) -> str:
        if isinstance(error, GgufSdError):
            return str(error)
        log.error("painting failed", exc_info=error)
        return "painting failed inside the server; its log says why"


class _Watch:
    """Passes on to tickets what the painter tells of their pictures."""

    def __init__(self, parts: Sequence[Part], worker: Worker):
        self.parts, self.worker = parts, worker
        self.last = time.monotonic()

    def wanted(self) -> list[int]:
        """The first picture of each ticket that is looked at."""
        now = time.monotonic()
        seen: dict[Ticket, int] = {}
        for index, part in enumerate(self.parts):
            if not part.ticket.over and part.ticket.looked > now:
                seen.setdefault(part.ticket, index)
        return list(seen.values())

    def step(self, step: int, looks: Mapping[int, bytes]) -> None:
        now, job = time.monotonic(), self.parts[0].job
        if step > 1:  # the first one's time is that of loading, too
            self.worker.line.measured(now - self.last, job.width * job.height * len(self.parts))
        self.worker.metrics.step(len(self.parts), now - self.last)
        self.last = now
        mine = {self.parts[index].ticket: look for index, look in looks.items()}
        for ticket in _tickets(self.parts):
            ticket.advance(step, mine.get(ticket))
        if self.worker.halted.is_set() or all(part.ticket.over for part in self.parts):
            raise _NotWantedError

    def finished(self, index: int, picture: Finished) -> None:
        part = self.parts[index]
        self.worker.metrics.picture(part.ticket)
        part.ticket.finish(part.index, picture)


def _tickets(parts: Sequence[Part]) -> list[Ticket]:
    return list({part.ticket: None for part in parts})
