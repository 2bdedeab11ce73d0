"""Jobs in processes of their own: kernels compile side by side, and a job that crashes or hangs takes only itself."""

from __future__ import annotations

import multiprocessing
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from queue import Queue
from typing import Any

from benchmarks.lib.deadline import Deadline


@dataclass(frozen=True)
class Failure:
    """Why a job has no outcome."""

    reason: str


def run_jobs(
    jobs: Sequence[Any], work: Callable[[Any], Any], processes: int, deadline: Deadline, job_seconds: float = 60
) -> Iterator[tuple[Any, Any]]:
    """Yields (job, ``work(job)`` or a Failure) as jobs end, in any order; they begin in theirs.

    ``work`` is a function of a module, jobs and outcomes can be pickled. Jobs not begun by the deadline are left out.
    A job that takes ``job_seconds`` is ended with its process. No ``processes``: one after another, in this one.
    """
    if not processes:
        for job in jobs:
            if deadline.passed:
                return
            yield job, _outcome(job, work)[0]
        return
    waiting, ended = deque(jobs), Queue()  # type: ignore[var-annotated]

    def drive() -> None:
        worker: _Worker | None = None
        try:
            while not deadline.passed:
                try:
                    job = waiting.popleft()
                except IndexError:
                    break
                worker = worker or _Worker(work)
                ended.put((job, worker.outcome(job, job_seconds)))
                if worker.finished:
                    worker = None
        finally:
            if worker:
                worker.stop()
            ended.put(None)

    threads = [threading.Thread(target=drive, daemon=True) for _ in range(min(processes, len(jobs)))]
    for thread in threads:
        thread.start()
    running = len(threads)
    while running:
        item = ended.get()
        if item is None:
            running -= 1
        else:
            yield item


class _Worker:
    """A process that does one job at a time."""

    def __init__(self, work: Callable[[Any], Any]):
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, work), daemon=True)
        self.process.start()
        other.close()
        self.finished = False

    def outcome(self, job: Any, seconds: float) -> Any:
        try:
            self.connection.send(job)
            if not self.connection.poll(seconds):
                self.stop()
                return Failure(f"not done after {seconds:.0f} s")
            result, usable = self.connection.recv()
        except (EOFError, OSError):
            self.stop()
            return Failure(f"the process died, exit code {self.process.exitcode}")
        if not usable:
            self.stop()
        return result

    def stop(self) -> None:
        self.finished = True
        self.process.kill()
        self.process.join()
        self.connection.close()


def _serve(connection: Connection, work: Callable[[Any], Any]) -> None:
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        connection.send(_outcome(job, work))


def _outcome(job: Any, work: Callable[[Any], Any]) -> tuple[Any, bool]:
    """(outcome, whether this process can go on)."""
    try:
        return work(job), True
    except Exception:
        return Failure(traceback.format_exc(limit=-4)), _device_usable()


def _device_usable() -> bool:
    """Whether the GPU still takes work from this process: after an illegal access it does not."""
    import torch

    if not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
