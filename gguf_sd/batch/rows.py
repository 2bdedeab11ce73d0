"""Files of prompts: one prompt a line (.txt), a table with a header (.csv) or a JSON object a line (.jsonl)."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from gguf_sd.adapters.lora import MAX_LORAS
from gguf_sd.errors import GgufSdError
from gguf_sd.field_checks import shown
from gguf_sd.input_files import open_input
from gguf_sd.json_text import json_object
from gguf_sd.keywords import check_known
from gguf_sd.request import Request
from gguf_sd.request_fields import PAIR, REAL, TRUTH, WHOLE, kind_of

MAX_BYTES = 256 << 20
MAX_ROWS = 1_000_000
MAX_LINE = 1 << 20  # characters
SUFFIXES = (".txt", ".csv", ".jsonl")
# Settings that are of the run, or of other commands, not of a row.
OF_THE_RUN = {"batch", "lora_dir", "embeddings", "controls"}
COLUMNS = [f.name for f in fields(Request) if f.name not in OF_THE_RUN] + ["name"]
PATHS = ("image", "mask")


@dataclass(frozen=True)
class Row:
    """What a row of the file sets, under the names of :class:`Request`; ``name`` is that of its pictures. ``error``
    says what is wrong with a row that cannot be painted."""

    number: int  # from 1, empty lines and the header not counted
    values: dict[str, Any] = field(default_factory=dict)
    error: str = ""


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, in order; its suffix says how it is read. Paths in it are taken from the file's folder.

    A row that makes no sense is a row with an error. Raises GgufSdError for a file that cannot be read as a whole: not
    there, not UTF-8, too large, a CSV header with an unknown column, no rows at all.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise GgufSdError(f"{path} is no file of prompts; give one that ends in {', '.join(SUFFIXES)}")
    text, folder = _text(path), path.resolve().parent
    read: Callable[[Path, str], Iterator[dict[str, Any] | str]]
    read = {".txt": _lines, ".csv": _table, ".jsonl": _objects}[path.suffix.lower()]
    rows = []
    for number, found in enumerate(read(path, text), 1):
        if number > MAX_ROWS:
            raise GgufSdError(f"{path} has more than {MAX_ROWS:,} rows; cut it into several files")
        rows.append(Row(number, error=found) if isinstance(found, str) else _row(number, found, folder))
    if not rows:
        raise GgufSdError(f"{path} holds no prompts")
    return rows


def _text(path: Path) -> str:
    try:
        with open_input(path) as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise GgufSdError(f"cannot read {path}: {error.strerror}") from error
    if len(data) > MAX_BYTES:
        raise GgufSdError(f"{path} has more than {MAX_BYTES >> 20} MiB; cut it into several files")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise GgufSdError(f"{path} is no UTF-8 text (byte {error.start:,}); save it as UTF-8") from None


def _lines(path: Path, text: str) -> Iterator[dict[str, Any] | str]:
    for line in text.split("\n"):
        if prompt := line.strip():
            yield {"prompt": prompt} if len(prompt) <= MAX_LINE else f"a prompt of {len(prompt):,} characters"


def _objects(path: Path, text: str) -> Iterator[dict[str, Any] | str]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield json_object(line, f"line {number}", MAX_LINE)
            except GgufSdError as error:
                yield str(error)


def _table(path: Path, text: str) -> Iterator[dict[str, Any] | str]:
    csv.field_size_limit(MAX_LINE)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        if twice := next((name for i, name in enumerate(header) if name in header[:i]), None):
            raise GgufSdError(f"{path}: the column {shown(twice)} stands there twice")
        _check_columns(dict.fromkeys(header), f"{path}: ")
        for cells in reader:
            if not any(cells):
                continue
            if len(cells) > len(header):
                yield f"line {reader.line_num} has {len(cells)} cells, the header has {len(header)}"
                continue
            filled = {name: cell for name, cell in zip(header, cells, strict=False) if cell != ""}
            try:
                yield {name: _from_cell(name, cell) for name, cell in filled.items()}
            except GgufSdError as error:
                yield str(error)
    except csv.Error as error:
        raise GgufSdError(f"{path}: line {reader.line_num} is no CSV: {error}") from None


def _check_columns(values: dict[str, Any], where: str = "") -> None:
    try:
        check_known(values, COLUMNS)
    except GgufSdError as error:
        raise GgufSdError(f"{where}{error}") from None


def _from_cell(name: str, cell: str) -> Any:
    """A CSV cell as the value that its column takes."""
    if name == "loras":
        return [lora.strip() for lora in cell.split(";")]
    what, convert = CELLS.get(kind_of(name), ("", str))
    try:
        return convert(cell.strip() if what else cell)
    except (ValueError, KeyError):
        raise GgufSdError(f"{name} must be {what}, got {shown(cell)}") from None


def _cell_pair(text: str) -> tuple[int, int]:
    first, _, second = text.partition("x")
    return int(first), int(second)


CELLS: dict[Any, tuple[str, Callable[[str], Any]]] = {
    WHOLE: ("a whole number", int),
    REAL: ("a number", float),
    PAIR: ("two numbers such as 1024x768", _cell_pair),
    TRUTH: ("true or false", lambda text: {"true": True, "false": False}[text.lower()]),
}


def _row(number: int, values: dict[str, Any], folder: Path) -> Row:
    try:
        _check_columns(values)
        values = {name: value for name, value in values.items() if value is not None}
        for name in PATHS:
            if name in values:
                values[name] = str(folder / _path(name, values[name]))
        if "loras" in values:
            values["loras"] = [_lora(item, folder) for item in _loras(values["loras"])]
    except GgufSdError as error:
        return Row(number, error=str(error))
    return Row(number, values)


def _loras(value: Any) -> list[Any]:
    found = value if isinstance(value, list) else [value]
    if len(found) > MAX_LORAS:  # each is looked for on the disk
        raise GgufSdError(f"{len(found):,} LoRAs are given; at most {MAX_LORAS} are taken")
    return found


def _path(name: str, value: Any) -> Path:
    if not isinstance(value, str) or not value or "\0" in value:
        raise GgufSdError(f"{name} takes a path, got {shown(value)}")
    return Path(value)


def _lora(item: Any, folder: Path) -> str:
    """``file`` or ``file:weight``, the file taken from the folder of prompts."""
    return str(folder / _path("loras", item))
