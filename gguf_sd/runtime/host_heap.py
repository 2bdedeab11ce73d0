"""What the C library keeps of memory that was freed, of the many tensors that a step makes and lets go."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch

from gguf_sd_kernels.cpu import scratch

# glibc's option: blocks of at least so many bytes come from the system one by one, and go back when they are freed.
# Unless it is set, it grows with what is freed, to 32 MiB, and holes between long-lived blocks stay resident.
M_MMAP_THRESHOLD = -3
FRUGAL, USUAL = 1 << 20, 32 << 20

_state = {"frugal": False}


def be_frugal(frugal: bool) -> None:
    """Whether tensors' memory goes back to the system as soon as they are freed, and large weights are decoded in
    parts. A step of SD 1.5 at 512x512 in bfloat16 peaked 110 MB lower so, of 450, and took 28 to 50 % longer, mostly
    for pages that come anew. Other C libraries than glibc know no such choice."""
    scratch.decode_in_parts(frugal)
    if frugal != _state["frugal"] and (mallopt := _glibc("mallopt")):
        mallopt(M_MMAP_THRESHOLD, FRUGAL if frugal else USUAL)
    _state["frugal"] = frugal


@contextmanager
def frugally(device: torch.device) -> Iterator[None]:
    """Frugal inside, as before behind it; on a CPU."""
    before = _state["frugal"]
    if device.type == "cpu":
        be_frugal(True)
    try:
        yield
    finally:
        if device.type == "cpu":
            be_frugal(before)


def trim() -> None:
    """Returns what is free at the end of the heap, and whole pages within it, to the system."""
    if malloc_trim := _glibc("malloc_trim"):
        malloc_trim(0)


@cache
def _glibc(name: str) -> Callable[..., int] | None:
    """A function of the C library; None where that is another."""
    try:
        found: Callable[..., int] = getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError, TypeError):
        return None
    return found
