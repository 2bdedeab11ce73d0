"""What one caller waits for: its pictures, how far they are, and whether they are still wanted.

A ticket is written by the worker's thread and read by the server's event loop; watchers are called, in the thread that
changed something, after every change.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from gguf_sd.errors import GgufSdError
from gguf_sd.request import Job

WAITING, RUNNING, DONE, FAILED, CANCELLED = "waiting", "running", "done", "failed", "cancelled"
_numbers = itertools.count(1)


@dataclass(frozen=True)
class Finished:
    """A picture as the bytes of a PNG that carries its settings, ``parameters``."""

    png: bytes
    seed: int
    flagged: bool
    parameters: str


@dataclass(eq=False)
class Ticket:
    """``jobs``: one for each picture, of count 1."""

    model: str
    jobs: Sequence[Job]
    chunks: int = 1  # of its prompts: what is painted at once has as many
    source: str = "page"  # which interface asked: page, openai or a1111
    number: int = field(default_factory=lambda: next(_numbers))
    state: str = WAITING
    error: str = ""
    step: int = 0  # of the pictures that are painted now
    look: bytes = b""  # JPEG of the first of them, where somebody wants to see it
    looked: float = 0.0  # until when, by time.monotonic()
    pictures: dict[int, Finished] = field(default_factory=dict)
    running: set[int] = field(default_factory=set)  # indices of pictures that are painted now
    created: float = field(default_factory=time.monotonic)
    started: float = 0.0
    ended: float = 0.0
    _watchers: list[Callable[[], object]] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def steps(self) -> int:
        return self.jobs[0].steps_run

    @property
    def over(self) -> bool:
        return self.state in (DONE, FAILED, CANCELLED)

    @property
    def whole(self) -> bool:
        """Whether all pictures are there."""
        return len(self.pictures) == len(self.jobs)

    @property
    def unbegun(self) -> list[int]:
        """Indices of the pictures that nobody paints yet."""
        return [i for i in range(len(self.jobs)) if i not in self.pictures and i not in self.running]

    @property
    def progress(self) -> float:
        """0 … 1."""
        share = len(self.running) * self.step / max(self.steps, 1)
        return min((len(self.pictures) + share) / len(self.jobs), 1.0)

    @property
    def work(self) -> float:
        """What is left to do: pixels times steps."""
        job = self.jobs[0]
        return (1 - self.progress) * len(self.jobs) * job.width * job.height * self.steps

    def watch(self, watcher: Callable[[], object]) -> Callable[[], None]:
        """Calls ``watcher`` after every change, from whatever thread; what it returns stops that."""
        with self._lock:
            self._watchers.append(watcher)
        return lambda: self._watchers.remove(watcher) if watcher in self._watchers else None

    def show_for(self, seconds: float) -> None:
        """Looks are made for that long from now."""
        self.looked = time.monotonic() + seconds

    def begin(self, indices: Sequence[int]) -> None:
        with self._lock:
            if not self.over:
                self.state, self.started = RUNNING, self.started or time.monotonic()
                self.running.update(indices)
                self.step = 0
        self._tell()

    def advance(self, step: int, look: bytes | None) -> None:
        with self._lock:
            self.step, self.look = step, look or self.look
        self._tell()

    def finish(self, index: int, picture: Finished) -> None:
        """Takes a picture; the first that comes for an index."""
        with self._lock:
            self.running.discard(index)
            if not self.over:
                self.pictures.setdefault(index, picture)
                if self.whole:
                    self._end(DONE)
        self._tell()

    def fail(self, error: str) -> None:
        with self._lock:
            if not self.over:
                self.error = error
                self._end(FAILED)
        self._tell()

    def cancel(self) -> None:
        """What is not painted yet never is; what is being painted stops at its next step."""
        with self._lock:
            if not self.over:
                self._end(CANCELLED)
        self._tell()

    def _end(self, state: str) -> None:
        self.state, self.ended = state, time.monotonic()
        self.running.clear()

    def _tell(self) -> None:
        for watcher in list(self._watchers):
            watcher()


class QueueFullError(Exception):
    """``retry_after``: whole seconds until there may be room."""

    def __init__(self, waiting: int, retry_after: int):
        super().__init__(f"{waiting} requests wait already; try again in {retry_after} s")
        self.retry_after = retry_after


class ShuttingDownError(GgufSdError):
    """The server takes no more work."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down; try again later")
