"""Whose unfinished files, or folders, lie in a folder: names of temporary files say which process writes them.

``.TARGET.HOST-PID-STARTED.RANDOM.partial``: the process is told by its number and by when it was started, so that
another one that got the same number later is not taken for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

OLD = 86_400  # seconds after which the file of a process that cannot be asked counts as left behind
STEM = 64  # characters of the target's name
NAME = re.compile(r"\.(?P<target>.*)\.(?P<host>[0-9a-f]{8})-(?P<pid>[0-9]{1,10})-(?P<started>[0-9]{1,20})"
                  r"\.[0-9a-f]{12}\.partial", re.DOTALL)  # fmt: skip


@cache
def _host() -> str:
    """This machine, and on Linux its part in which process numbers mean the same (a container has its own)."""
    space = ""
    with contextlib.suppress(OSError):
        space = os.readlink("/proc/self/ns/pid")
    return hashlib.sha256(f"{platform.node()} {space}".encode()).hexdigest()[:8]


def _started(pid: int) -> int:
    """When a process began, in the clock ticks of Linux' /proc; 0 where that cannot be said."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0


def temporary_name(target: Path) -> Path:
    """A name of this process's own, beside the target."""
    mine = f"{_host()}-{os.getpid()}-{_started(os.getpid())}"
    return target.with_name(f".{target.name[:STEM]}.{mine}.{secrets.token_hex(6)}.partial")


def _running(found: re.Match[str], path: Path) -> bool:
    """Whether the process that a name tells of may still be writing."""
    pid, started = int(found["pid"]), int(found["started"])
    if found["host"] != _host() or not started or not Path("/proc/self/stat").exists():
        try:
            return time.time() - path.stat().st_mtime < OLD
        except OSError:  # gone meanwhile
            return False
    return _started(pid) == started


def _partials(folder: Path) -> Iterator[tuple[Path, re.Match[str]]]:
    """The temporary files in a folder, of whatever targets and processes."""
    try:
        names = os.listdir(folder)
    except OSError:  # no such folder: the caller finds out
        return
    for name in names:
        if (found := NAME.fullmatch(name)) is not None:
            yield folder / name, found


def remove_stale(folder: Path) -> None:
    """Removes what processes that are no more left unfinished in a folder."""
    for path, found in _partials(folder):
        if not _running(found, path):
            with contextlib.suppress(OSError):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def other_writer(target: Path) -> int | None:
    """The number of another process that writes the target at this moment."""
    for path, found in _partials(target.parent):
        if found["target"] == target.name[:STEM] and int(found["pid"]) != os.getpid() and _running(found, path):
            return int(found["pid"])
    return None
