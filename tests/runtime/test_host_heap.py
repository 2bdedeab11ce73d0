"""Freed memory that goes back at once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gguf_sd.runtime import host_heap

MEGABYTE = 1 << 20
# In a process of its own: in a heap that others have left holes in, blocks may come to lie there.
FREES_EVERY_SECOND = """
import sys
from pathlib import Path
import torch
from gguf_sd.runtime import host_heap

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

host_heap.be_frugal(True)
host_heap.be_frugal(False)  # as in a process that has freed large tensors before
host_heap.be_frugal(sys.argv[1] == "frugal")
blocks = [torch.ones(4 << 20, dtype=torch.uint8) for _ in range(16)]
before = resident()
del blocks[::2]
print(before - resident())
"""


@pytest.mark.skipif(host_heap._glibc("mallopt") is None or not Path("/proc/self/statm").exists(), reason="needs glibc")
def test_freed_tensors_leave_no_holes() -> None:
    """Between others that live on."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}

    def given_back(how: str) -> int:
        command = [sys.executable, "-c", FREES_EVERY_SECOND, how]
        return int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)

    assert given_back("frugal") > 30 * MEGABYTE
    assert given_back("usual") < 10 * MEGABYTE
