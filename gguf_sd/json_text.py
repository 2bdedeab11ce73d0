"""JSON from files that a stranger may have written: bounded in size, depth and number of values."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gguf_sd.errors import GgufSdError
from gguf_sd.field_checks import shown
from gguf_sd.input_files import open_input

MAX_SETTINGS = 1 << 20  # characters of a configuration file
MAX_TABLE = 16 << 20  # characters of a table of tensors, or of a vocabulary
MAX_CONTAINERS = 1 << 19  # lists and objects: three characters of a text can take 64 bytes of memory
MAX_VALUES = 1 << 21
MAX_DEPTH = 32


def json_object(text: object, what: str, most: int = MAX_SETTINGS) -> dict[str, Any]:
    """The JSON object that ``text`` (str, or bytes of UTF-8) holds. ``what`` names it at the start of the GgufSdError
    raised for anything else, for more than ``most`` characters, and for more values or deeper ones than the MAX_ above.

    Python's NaN and Infinity, which are no JSON, are read: diffusers writes them in settings that nobody here needs.
    """
    if not isinstance(text, str | bytes):
        raise GgufSdError(f"{what} is no JSON object but {shown(text)}")
    if len(text) > most:
        raise GgufSdError(f"{what} is {len(text):,} characters long; gguf-sd takes up to {most:,}")
    _check_number(text, what)
    try:
        value = json.loads(text)
    except RecursionError:
        raise GgufSdError(f"{what} is no JSON object that can be read: it is nested too deeply") from None
    except ValueError as error:
        raise GgufSdError(f"{what} is no JSON object: {error}") from error
    if not isinstance(value, dict):
        raise GgufSdError(f"{what} is no JSON object but {shown(value)}")
    if not _shallow(value, MAX_DEPTH):
        raise GgufSdError(f"{what} is no JSON object that can be read: it is nested deeper than {MAX_DEPTH}")
    return value


def _check_number(text: str | bytes, what: str) -> None:
    """Counts brackets and commas, inside of strings too: real files stay far below."""
    count: Callable[[str], int] = text.count if isinstance(text, str) else lambda mark: text.count(mark.encode())
    if count("[") + count("{") > MAX_CONTAINERS or count(",") > MAX_VALUES:
        raise GgufSdError(f"{what} holds too many values; gguf-sd takes {MAX_CONTAINERS:,} lists and objects")


def _shallow(value: Any, left: int) -> bool:
    if not isinstance(value, dict | list):
        return True
    inner = value.values() if isinstance(value, dict) else value
    return left > 0 and all(_shallow(item, left - 1) for item in inner)


def read_json_object(path: Path, most: int = MAX_SETTINGS) -> dict[str, Any]:
    """The JSON object in a file, as :func:`json_object`; raises OSError where the file cannot be read."""
    with open_input(path) as file:
        return json_object(file.read(most + 1), str(path), most)
