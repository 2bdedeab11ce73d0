"""Freed memory that goes back at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gguf_sd.runtime import host_heap

MEGABYTE = 1 << 20


def resident() -> int:
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * 4096


@pytest.mark.skipif(host_heap._glibc("mallopt") is None or not Path("/proc/self/statm").exists(), reason="needs glibc")
def test_freed_tensors_leave_no_holes() -> None:
    """Between others that live on."""
    try:
        host_heap.be_frugal(True)
        host_heap.be_frugal(False)  # as in a process that has freed large tensors before
        host_heap.be_frugal(True)
        blocks = [torch.ones(4 * MEGABYTE, dtype=torch.uint8) for _ in range(16)]
        before = resident()
        del blocks[::2]
        assert before - resident() > 30 * MEGABYTE
    finally:
        host_heap.be_frugal(False)
        assert not host_heap._state["frugal"]
