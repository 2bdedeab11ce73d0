"""The way that weights take to a device beside its computing: a second stream, and pinned memory to copy from."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import cycle
from typing import Any, Protocol

import torch
from torch import Tensor

log = logging.getLogger(__name__)

# Weights on their way at a time: one is copied into pinned memory while that before it goes to the device.
RING = 3


class Event(Protocol):
    """Something that a stream comes past."""

    def synchronize(self) -> None: ...

    def record(self, stream: Any) -> None: ...


class Lane(Protocol):
    """Copies weights to a device. ``slots``: how many stages it has room for, one that is used and those on the way."""

    slots: int
    nbytes: int  # device memory of its own

    def room(self, nbytes: int) -> Tensor:
        """Memory on the device to copy to, uint8 [nbytes]."""
        ...

    def copying(self) -> AbstractContextManager[object]:
        """What is started inside runs beside the computing."""
        ...

    def bring(self, stored: Tensor) -> Tensor:
        """A tensor of host memory on the device, valid for what is started before the next is brought."""
        ...

    def copied(self) -> Event | None:
        """Marks the end of the copies that were started."""
        ...

    def computed(self) -> Event | None:
        """Marks the end of the computing that was started."""
        ...

    def compute_after(self, event: Event | None) -> None:
        """Computing that is started from now on waits for ``event``."""
        ...

    def copy_after(self, event: Event | None) -> None:
        """Copies that are started from now on wait for ``event``."""
        ...


class HostLane:
    """For a device that computes in the memory where the file is mapped: nothing is on the way."""

    slots, nbytes = 1, 0

    def room(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def copying(self) -> AbstractContextManager[object]:
        return nullcontext()

    def bring(self, stored: Tensor) -> Tensor:
        return stored

    def copied(self) -> Event | None:
        return None

    def computed(self) -> Event | None:
        return None

    def compute_after(self, event: Event | None) -> None:
        pass

    def copy_after(self, event: Event | None) -> None:
        pass


class GpuLane:
    """A stream of copies. A weight goes from the mapped file into a ring of pinned buffers, from there to a buffer on
    the device, and is unpacked from that, on the same stream, to where it is used.

    ``largest``: bytes of the largest weight in the file. The host waits where the ring is full, and so runs at most
    RING weights ahead.
    """

    slots = 2

    def __init__(self, device: torch.device, largest: int):
        self.device, self.nbytes = device, largest
        self.gpu: Any = torch.get_device_module(device)  # torch.cuda, which is AMD's too, or another
        self.stream = self.gpu.Stream(device)
        self._ring = [_pinned(largest, device) for _ in range(RING)]
        self._sent: list[Event | None] = [None] * RING
        self._next = cycle(range(RING))
        self._landing = self.room(largest)

    def room(self, nbytes: int) -> Tensor:
        memory = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        # Allocated on the stream that computes, used on both: when it is let go, torch is to wait for both.
        memory.record_stream(self.stream)
        return memory

    @contextmanager
    def copying(self) -> Iterator[None]:
        with self.gpu.stream(self.stream):
            yield

    def bring(self, stored: Tensor) -> Tensor:
        index = next(self._next)
        if (sent := self._sent[index]) is not None:
            sent.synchronize()
        pinned, landed = laid_out(self._ring[index], stored), laid_out(self._landing, stored)
        pinned.copy_(stored)
        landed.copy_(pinned, non_blocking=True)
        self._sent[index] = self.copied()
        return landed

    def copied(self) -> Event:
        event: Event = self.gpu.Event()
        event.record(self.stream)
        return event

    def computed(self) -> Event:
        event: Event = self.gpu.Event()
        event.record(self.gpu.current_stream(self.device))
        return event

    def compute_after(self, event: Event | None) -> None:
        if event is not None:
            self.gpu.current_stream(self.device).wait_event(event)

    def copy_after(self, event: Event | None) -> None:
        if event is not None:
            self.stream.wait_event(event)


def lane_to(device: torch.device, largest: int) -> Lane:
    """The way to ``device`` for weights of at most ``largest`` bytes."""
    return GpuLane(device, largest) if device.type != "cpu" else HostLane()


def _pinned(nbytes: int, device: torch.device) -> Tensor:
    try:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=device.type != "cpu")
    except RuntimeError as error:  # a limit on locked memory
        log.warning("no pinned memory for streaming, which will be slower: %s", str(error).splitlines()[0])
        return torch.empty(nbytes, dtype=torch.uint8)


def laid_out(memory: Tensor, like: Tensor) -> Tensor:
    """The beginning of ``memory``, uint8, as a tensor of the shape, dtype and order of ``like``, without gaps."""
    strides = torch.empty_like(like, device="meta").stride()
    return memory[: like.nbytes].view(like.dtype).as_strided(like.shape, strides)
