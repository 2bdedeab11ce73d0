"""The line in front of the device: who is served together, refused, cancelled, or told that the server goes."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from gguf_sd.errors import GgufSdError
from gguf_sd.request import Job, Request
from gguf_sd.server.line import Line
from gguf_sd.server.metrics import Metrics
from gguf_sd.server.shelf import Shelf, Watcher
from gguf_sd.server.tickets import CANCELLED, DONE, FAILED, Finished, QueueFullError, ShuttingDownError, Ticket
from gguf_sd.server.worker import Worker
from tests.server.conftest import until


class Recorder:
    """A painter that paints nothing: it runs the steps that it is let run."""

    def __init__(self) -> None:
        self.groups: list[list[str]] = []
        self.go = threading.Event()
        self.go.set()

    def paint(self, model: str, jobs: Sequence[Job], watcher: Watcher) -> None:
        self.groups.append([job.prompt for job in jobs])
        for step in range(1, jobs[0].steps_run + 1):
            assert self.go.wait(10)
            if any(job.prompt == "bad" for job in jobs):
                raise GgufSdError("bad is bad")
            looks: Mapping[int, bytes] = dict.fromkeys(watcher.wanted(), b"look")
            watcher.step(step, looks)
        for index, job in enumerate(jobs):
            watcher.finished(index, Finished(job.prompt.encode(), job.seed, False, ""))


@pytest.fixture
def made(shelf: Shelf) -> Any:
    class Made:
        def __init__(self) -> None:
            self.painter, self.line = Recorder(), Line(3, 3)
            self.worker = Worker(self.line, self.painter, Metrics(self.line, shelf))

        def ticket(self, prompt: str, count: int = 1, model: str = "demo-q8_0", **settings: Any) -> Ticket:
            job = shelf.prepare(model, Request(prompt, **({"steps": 3, "seed": 0, "batch": 3} | settings)))
            return Ticket(model, [job] * count)

        def submit(self, *args: Any, **settings: Any) -> Ticket:
            ticket = self.ticket(*args, **settings)
            self.line.submit(ticket)
            return ticket

    made = Made()
    yield made
    made.painter.go.set()
    made.line.close()
    made.worker.halt()
    if made.worker.is_alive():
        made.worker.join(5)


def wait(*tickets: Ticket) -> None:
    until(lambda: all(ticket.over for ticket in tickets))


def test_equal_shapes_are_painted_at_once(made: Any) -> None:
    made.line.limit = 10
    tickets = [
        made.submit("a"),
        made.submit("b", steps=4),
        made.submit("c", count=3),
        made.submit("d"),
        made.submit("e", model="demo-q4_0"),
    ]
    tickets[2].show_for(100)
    made.worker.start()
    wait(*tickets)
    assert [ticket.look for ticket in tickets] == [b"", b"", b"look", b"", b""]
    assert made.painter.groups == [["a", "c", "c"], ["b"], ["c", "d"], ["e"]]
    assert [len(ticket.pictures) for ticket in tickets] == [1, 1, 3, 1, 1]
    assert all(ticket.state == DONE for ticket in tickets)


def test_the_line_is_bounded(made: Any) -> None:
    tickets = [made.submit("a", steps=n) for n in (3, 4, 5)]
    made.line.measured(30.0, tickets[0].work)  # thirty seconds for as much work
    with pytest.raises(QueueFullError) as caught:
        made.submit("late")
    assert caught.value.retry_after == 30 + 40 + 50
    made.worker.start()
    wait(*tickets)
    made.submit("in time")


def test_who_leaves_is_not_painted(made: Any) -> None:
    made.painter.go.clear()
    first, second = made.submit("a"), made.submit("b", steps=4)
    third = made.submit("c", steps=5)
    made.worker.start()
    second.cancel()
    until(lambda: first.started)
    first.cancel()
    made.painter.go.set()
    wait(first, second, third)
    assert made.painter.groups == [["a"], ["c"]], "and the first ended at its next step"
    assert [ticket.state for ticket in (first, second, third)] == [CANCELLED, CANCELLED, DONE]
    assert not first.pictures


def test_one_of_two_leaves(made: Any) -> None:
    made.painter.go.clear()
    stays, goes = made.submit("stays"), made.submit("goes")
    made.worker.start()
    until(lambda: goes.started)
    goes.cancel()
    made.painter.go.set()
    wait(stays)
    assert (stays.state, len(stays.pictures), len(goes.pictures)) == (DONE, 1, 0)


def test_what_fails_fails_for_its_cause_alone(made: Any) -> None:
    good, bad = made.submit("good", count=2), made.submit("bad")
    made.worker.start()
    wait(good, bad)
    assert (good.state, bad.state, bad.error) == (DONE, FAILED, "bad is bad")


def test_a_server_that_goes_finishes_what_it_paints(made: Any) -> None:
    made.painter.go.clear()
    painted, waiting = made.submit("painted"), made.submit("waiting", steps=4)
    made.worker.start()
    until(lambda: painted.started)
    made.line.close()
    with pytest.raises(ShuttingDownError):
        made.submit("late")
    assert (waiting.state, painted.state) == (FAILED, "running")
    made.painter.go.set()
    wait(painted)
    assert painted.state == DONE
    made.worker.join(5)
    assert not made.worker.is_alive()


def test_progress_and_time_left(made: Any) -> None:
    ticket = made.submit("a", count=2, width=64, height=64)
    made.line.measured(2.0, ticket.work)
    behind = made.submit("b", steps=6)
    assert made.line.seconds_left(ticket) == pytest.approx(2)
    assert made.line.seconds_left(behind) == pytest.approx(4)
    ticket.begin([0, 1])
    ticket.advance(1, None)
    assert ticket.progress == pytest.approx(1 / 3)
    assert made.line.seconds_left(ticket) == pytest.approx(4 / 3)
    ticket.finish(0, Finished(b"", 0, False, ""))
    assert ticket.progress == pytest.approx(2 / 3)
