"""One reusable buffer a thread for decoded weights, so that a UNet pass neither allocates nor returns memory.

A fresh 16-bit weight of up to 56 MiB a layer comes from the operating system page by page, and goes back after
the layer; the pages alone cost a tenth of a second a pass.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class _Store(threading.local):
    """A thread's buffer, None while it is lent."""

    def __init__(self) -> None:
        self.buffer: Tensor | None = torch.empty(0, dtype=torch.uint8)


_store = _Store()
_parts = {"parts": False}


@contextmanager
def borrow(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Iterator[Tensor]:
    """Lends an uninitialised contiguous tensor of ``shape``, valid until the ``with`` block ends.

    On a CPU it lies in the calling thread's buffer, which grows to the largest size asked for. Borrowing again
    inside the block is safe and gives memory of its own. Other devices have caching allocators: there it is
    ``torch.empty``. Raises MemoryError where a CPU has not so much memory; smaller tensors can be borrowed then.
    """
    buffer = _store.buffer
    if device.type != "cpu" or buffer is None:
        yield torch.empty(shape, dtype=dtype, device=device)
        return
    n_bytes = math.prod(shape) * dtype.itemsize
    if buffer.numel() < n_bytes:
        del buffer  # before its successor is allocated
        _store.buffer = torch.empty(0, dtype=torch.uint8)
        buffer = _allocated(n_bytes)
    _store.buffer = None
    try:
        yield buffer[:n_bytes].view(dtype).view(shape)
    finally:
        _store.buffer = buffer


def _allocated(n_bytes: int) -> Tensor:
    try:
        with torch.inference_mode(False):  # usable in inference mode and out of it
            return torch.empty(n_bytes, dtype=torch.uint8)
    except RuntimeError as error:
        raise MemoryError(f"no {n_bytes / 1e6:.0f} MB of memory for a decoded weight") from error


def decode_in_parts(parts: bool) -> None:
    """Whether, from now on and in all threads, large weights are decoded some rows at a time where that gives the same
    sums: the buffer stays small, a step of SD 1.5 takes 2 % longer."""
    _parts["parts"] = parts


def in_parts() -> bool:
    """Whether they are."""
    return _parts["parts"]


def release() -> None:
    """Gives the calling thread's buffer back; the next borrower allocates it anew."""
    if _store.buffer is not None:
        _store.buffer = torch.empty(0, dtype=torch.uint8)
