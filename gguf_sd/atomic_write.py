"""Writing files so that they appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from gguf_sd.errors import GgufSdError


@contextlib.contextmanager
def temporary_beside(target: Path) -> Iterator[Path]:
    """A new empty file in the target's folder, removed at the end unless it was renamed to its place."""
    path = target.with_name(f".{target.name[:64]}.{secrets.token_hex(6)}.partial")
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except OSError as error:
        raise GgufSdError(f"cannot write to {target.parent}: {error.strerror}") from error
    try:
        yield path
    finally:
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
        os.replace(temporary, target)
    _sync_folder(target.parent)


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
