"""What a server counts, for Prometheus."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from gguf_sd.server.line import Line
from gguf_sd.server.shelf import Shelf
from gguf_sd.server.tickets import Ticket

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 900)
NEWEST = 0.2  # weight of the newest step in the pace that is shown


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self, line: Line, shelf: Shelf):
        self.registry = CollectorRegistry()
        new: Any = {"namespace": "gguf_sd", "registry": self.registry}
        self.requests = Counter("requests", "Requests that were answered.", ["interface", "status"], **new)
        self.pictures = Counter("pictures", "Pictures painted.", ["model", "interface"], **new)
        self.steps = Counter("steps", "Sampling steps, times pictures.", **new)
        self.cancelled = Counter("cancelled", "Requests cancelled by their callers, or by these leaving.", **new)
        self.failures = Counter("failures", "Requests whose painting failed.", **new)
        self.seconds = Histogram(
            "request_seconds", "From a request to its last picture.", ["interface"], buckets=SECONDS, **new
        )
        self.waited = Histogram("wait_seconds", "From a request to its first step.", buckets=SECONDS, **new)
        self.pace = Gauge("steps_per_second", "Of late, times pictures.", **new)
        self.bytes = Gauge("memory_bytes", "Memory: of the process, and of the device.", ["kind"], **new)
        self.loaded = Gauge("model_loaded_bytes", "Weights that are loaded.", ["model"], **new)
        Gauge("queue_waiting", "Requests that wait.", **new).set_function(line.waiting)
        Gauge("queue_limit", "Requests that may wait.", **new).set(line.limit)
        Gauge("queue_open", "Requests that wait or are painted.", **new).set_function(lambda: len(line.open_tickets()))
        Gauge("model_swaps", "How often a model was let go for another.", **new).set_function(lambda: shelf.swaps)
        self._shelf, self._pace = shelf, 0.0

    def step(self, pictures: int, seconds: float) -> None:
        self.steps.inc(pictures)
        now = pictures / max(seconds, 1e-6)
        self._pace = now if not self._pace else (1 - NEWEST) * self._pace + NEWEST * now
        self.pace.set(self._pace)

    def picture(self, ticket: Ticket) -> None:
        self.pictures.labels(ticket.model, ticket.source).inc()

    def failed(self) -> None:
        self.failures.inc()

    def answered(self, interface: str, status: int) -> None:
        self.requests.labels(interface, status).inc()

    def ended(self, tickets: Iterable[Ticket]) -> None:
        """Counts those that are over, each once."""
        for ticket in tickets:
            if ticket.over and ticket.started:
                self.waited.observe(ticket.started - ticket.created)
                self.seconds.labels(ticket.source).observe(ticket.ended - ticket.created)

    def text(self) -> bytes:
        """In Prometheus' format."""
        self.bytes.labels("process").set(process_bytes())
        device = next(iter(self._shelf.models.values())).pipeline.device
        if device.type != "cpu":
            import torch

            self.bytes.labels("device_reserved").set(torch.get_device_module(device).memory_reserved(device))
        for name, count in self._shelf.loaded().items():
            self.loaded.labels(name).set(count)
        return generate_latest(self.registry)


def process_bytes() -> int:
    """Resident memory of this process; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0
