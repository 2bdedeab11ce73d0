"""What was painted: a line of JSON for each picture, written as it is finished, in the pictures' folder.

A painted one: ``row``, ``picture``, ``file``, ``key`` (of its settings), ``sha256``, ``bytes``, ``prompt``, ``seed``,
``flagged``, ``settings``; one that failed: ``row``, ``picture``, ``file``, ``key``, ``error``. At the end of a run the
lines are put in the order of the rows; they hold no times, so that equal runs write equal files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from gguf_sd.atomic_write import put_if_free, put_in_place, temporary_beside
from gguf_sd.batch.items import Item
from gguf_sd.batch.painter import Result
from gguf_sd.errors import GgufSdError
from gguf_sd.imaging.png_metadata import written_by_us
from gguf_sd.input_files import open_input
from gguf_sd.json_text import MAX_SETTINGS, json_object

NAME = "manifest.jsonl"
Line = dict[str, Any]


class Manifest:
    """The manifest of a folder, and the pictures beside it."""

    def __init__(self, folder: Path, items: Iterable[Item], model: str):
        """``model`` stands for the model and how it computes, see :meth:`Item.key`."""
        self.folder, self.path = folder, folder / NAME
        self.keys = {item.file: item.key(model) for item in items}
        self.lines: dict[str, Line] = {}
        self._order = list(self.keys)
        self._file: IO[str] | None = None

    @contextlib.contextmanager
    def open(self, resume: bool) -> Iterator[None]:
        """Takes the folder for this run; within, pictures can be added. Raises GgufSdError where another run has it,
        where it holds a manifest that is not to be resumed, and where files that are not ours have the pictures'
        names."""
        with _sole_use(self.folder):
            if os.path.lexists(self.path) and not resume:
                raise GgufSdError(f"{self.path} is there already; go on with --resume, or choose another --output")
            if resume:
                self.lines = {file: line for file, line in self._read() if self._is_whole(file, line)}
            for file in self.keys:
                path = self.folder / file
                if file not in self.lines and os.path.lexists(path) and not written_by_us(path):
                    raise GgufSdError(f"{path} exists and is no picture of gguf-sd's; choose another --output")
            self._rewrite()
            with open(self.path, "a", encoding="utf-8") as self._file:
                yield
            self._rewrite()

    def done(self, item: Item) -> bool:
        """Whether an item's picture is there and whole."""
        return item.file in self.lines and "error" not in self.lines[item.file]

    @property
    def failed(self) -> list[Line]:
        return [line for line in self.lines.values() if "error" in line]

    def add(self, result: Result) -> bool:
        """Writes a picture, then its line; False, and nothing is written, where that was done before."""
        item = result.item
        if item.file in self.lines:
            return False
        line: Line = {"row": item.row, "picture": item.picture, "file": item.file, "key": self.keys[item.file]}
        if result.error:
            line |= {"error": result.error}
        else:
            _write(self.folder / item.file, result.png)
            digest = hashlib.sha256(result.png).hexdigest()
            line |= {"sha256": digest, "bytes": len(result.png), **(result.facts or {})}
        self.lines[item.file] = line
        assert self._file is not None, "within open() alone"
        try:
            self._file.write(_text(line))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise GgufSdError(f"cannot write {self.path}: {error.strerror}") from error
        return True

    def _read(self) -> Iterator[tuple[str, Line]]:
        """The lines of painted pictures that this run would paint the same; what is torn or foreign is left out."""
        try:
            with open_input(self.path) as file:
                for data in file:
                    with contextlib.suppress(GgufSdError):
                        line = json_object(data, "a line", MAX_SETTINGS)
                        name = line.get("file")
                        if isinstance(name, str) and self.keys.get(name, "") == line.get("key") and "sha256" in line:
                            yield name, line
        except FileNotFoundError:
            return
        except OSError as error:
            raise GgufSdError(f"cannot read {self.path}: {error.strerror}") from error

    def _is_whole(self, file: str, line: Line) -> bool:
        try:
            with open_input(self.folder / file) as picture:
                return hashlib.file_digest(picture, "sha256").hexdigest() == line["sha256"]
        except (OSError, GgufSdError):
            return False

    def _rewrite(self) -> None:
        with temporary_beside(self.path) as temporary:
            with open(temporary, "w", encoding="utf-8") as file:
                file.writelines(_text(self.lines[name]) for name in self._order if name in self.lines)
            put_in_place(temporary, self.path)


def _text(line: Line) -> str:
    return json.dumps(line, ensure_ascii=False) + "\n"


def _write(path: Path, data: bytes) -> None:
    ours = os.path.lexists(path) and written_by_us(path)
    with temporary_beside(path) as temporary:
        temporary.write_bytes(data)
        try:
            (put_in_place if ours else put_if_free)(temporary, path)
        except FileExistsError:
            raise GgufSdError(f"{path} has appeared meanwhile and is not ours; choose another --output") from None


@contextlib.contextmanager
def _sole_use(folder: Path) -> Iterator[None]:
    """Holds a folder against other runs, where the system has locks for that."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise GgufSdError(f"cannot read {folder}: {error.strerror}; choose another --output") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise GgufSdError(f"another gguf-sd batch writes to {folder}; wait for it, or choose another -o") from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)
