"""Code that ran once leaves memory, and runs again."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

FORGETS = """
from pathlib import Path
import torch
from gguf_sd.runtime import library_pages

def of_files():
    return int(Path("/proc/self/statm").read_text().split()[2]) * 4096

before = of_files()
looked_at = library_pages.forget()
print(looked_at, before, of_files())
x = torch.arange(12.0).reshape(3, 4)
print((x @ x.T).sum().item(), torch.nn.functional.conv2d(x[None, None], torch.ones(1, 1, 2, 2)).sum().item())
"""


@pytest.mark.skipif(not Path("/proc/self/smaps").exists() or not hasattr(mmap, "MADV_DONTNEED"), reason="needs Linux")
def test_code_goes_and_comes_back() -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", FORGETS], env=environment, capture_output=True, text=True, check=True)
    looked_at, before, after, *results = map(float, done.stdout.split())
    assert looked_at > before  # torch's is much larger than what of it is in memory
    assert before - after > 30e6
    assert results == [1134.0, 132.0]


# What must never be dropped: memory of no file, what can be written, what others see, data.
OTHERS = (("r-xp", "[heap]"), ("rw-p", "[heap]"), ("rw-p", "[stack]"), ("rw-p", ""), ("r-xp", "[anon: jit]"),
          ("rwxp", "/lib/a.so"), ("r-xs", "/lib/a.so"), ("r--p", "/lib/a.so"), ("rw-s", "/dev/shm/x"))  # fmt: skip


def test_changed_code_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A debugger's breakpoints, and what patches a library."""
    from gguf_sd.runtime import library_pages

    def mapping(at: int, rights: str, path: str, changed: int) -> str:
        return f"{at:x}-{at + 4096:x} {rights} 00000000 fe:00 12 {path}\nRss: 4 kB\nAnonymous: {changed} kB\n"

    smaps = mapping(0x1000, "r-xp", "/lib/a.so", 0) + mapping(0x3000, "r-xp", "/lib/b.so", 4)
    smaps += mapping(0x5000, "rw-p", "/lib/a.so", 0) + mapping(0x7000, "r-xp", "[vdso]", 0)
    smaps += mapping(0x9000, "r-xp", "", 0) + mapping(0xB000, "r-xp", "/with a space/c.so", 0)
    for at, (rights, path) in enumerate(OTHERS):
        smaps += mapping(0x10000 + 0x1000 * at, rights, path, 0)
    monkeypatch.setattr(Path, "read_text", lambda self, **options: smaps)
    assert list(library_pages._code()) == [(0x1000, 0x2000), (0xB000, 0xC000)]
