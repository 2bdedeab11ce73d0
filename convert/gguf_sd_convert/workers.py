"""Threads that work on whole tensors, in a bounded amount of memory."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

IN_FLIGHT = 192 << 20  # bytes of source tensors that may be in memory at once (a larger one goes alone)
T = TypeVar("T")


@contextmanager
def workers(threads: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of ``threads``, 0 for one a core, that each run torch on one core: whole tensors in parallel scale
    better than slices of one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads or min(cores, 8), initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(before)


def in_order(jobs: Iterable[tuple[int, Callable[[], T]]], pool: ThreadPoolExecutor) -> Iterator[T]:
    """Results of jobs, given as (bytes they hold, function), in their order; jobs of at most IN_FLIGHT bytes are
    begun and not yet handed out."""
    waiting: deque[tuple[int, Future[T]]] = deque()
    held = 0
    for nbytes, job in jobs:
        while waiting and held + nbytes > IN_FLIGHT:
            size, future = waiting.popleft()
            yield future.result()
            held -= size
        waiting.append((nbytes, pool.submit(job)))
        held += nbytes
    while waiting:
        yield waiting.popleft()[1].result()
