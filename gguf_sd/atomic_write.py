"""Writing files so that they appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from gguf_sd.errors import GgufSdError
from gguf_sd_kernels.writers import remove_stale, temporary_name


@contextlib.contextmanager
def temporary_beside(target: Path) -> Iterator[Path]:
    """A new empty file in the target's folder, removed at the end unless it was renamed to its place. What dead
    processes left unfinished there is removed first.

    Whatever the operating system refuses meanwhile (a full disk, a file or folder that must not be written or is gone)
    is raised as GgufSdError; FileExistsError stays what it is.
    """
    remove_stale(target.parent)
    path = temporary_name(target)
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except OSError as error:
        raise GgufSdError(f"cannot write to {target.parent}: {error.strerror}") from error
    try:
        yield path
    except FileExistsError:
        raise
    except OSError as error:
        raise GgufSdError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):  # nothing to remove, or the folder has gone
            path.unlink(missing_ok=True)


def put_in_place(temporary: Path, target: Path) -> None:
    """Syncs a finished file and renames it to ``target``, durably, in place of what was there."""
    _sync(temporary)
    os.replace(temporary, target)
    _sync_folder(target.parent)


def put_if_free(temporary: Path, target: Path) -> None:
    """As :func:`put_in_place`, but raises FileExistsError where there is something already; of several processes that
    try the same name at once, one succeeds."""
    _sync(temporary)
    try:
        os.link(temporary, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links: the name is taken first, then filled
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        try:
            os.replace(temporary, target)
        except OSError:
            target.unlink(missing_ok=True)
            raise
    _sync_folder(target.parent)


def _sync(path: Path) -> None:
    with open(path, "r+b") as file:  # Windows syncs only what is open for writing
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    """So that the name survives a power cut, where folders can be synced: Windows opens none, some file systems sync
    none. The file is there by now in any case."""
    if os.name == "nt":
        return
    with contextlib.suppress(OSError):
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
