"""Findings on disk: a JSON file that several processes may write, each whole, none waiting for another."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gguf_sd_kernels.writers import remove_stale, temporary_name

log = logging.getLogger(__name__)
MAX_BYTES = 16 << 20

Entries = dict[str, Any]
_told: set[str] = set()


def read_entries(path: Path) -> Entries:
    """The file's object; an empty one where there is no file, or none that can be read, which is said once."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES} bytes")
        entries = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(entries, dict):
            raise ValueError("it is no JSON object")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, RecursionError) as error:
        say_once(f"{path} cannot be read ({error}): what it held is found out anew")
        return {}
    return entries


def say_once(sentence: str) -> None:
    """Warns of something, the first time alone."""
    if sentence not in _told:
        _told.add(sentence)
        log.warning("%s", sentence)


def update_entries(path: Path, change: Callable[[Entries], Entries]) -> None:
    """Replaces the file by ``change`` of what it holds now. Two processes at once both leave a whole file; of what
    they add in the same moment the last one's stays, and the other's is found out again some day.

    A folder that cannot be written to is said once, and nothing is kept.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(path.parent)
        name = temporary_name(path)
        try:
            with open(name, "x", encoding="utf-8") as file:
                json.dump(change(read_entries(path)), file, indent=1)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
    except OSError as error:
        say_once(f"{path} cannot be written ({error.strerror or error}): what was found is forgotten at the end")
