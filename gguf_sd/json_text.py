"""JSON from files that a stranger may have written: bounded in size and depth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gguf_sd.errors import GgufSdError
from gguf_sd.field_checks import shown

MAX_SETTINGS = 1 << 20  # characters of a configuration file
MAX_TABLE = 16 << 20  # characters of a table of tensors


def json_object(text: object, what: str, most: int = MAX_SETTINGS) -> dict[str, Any]:
    """The JSON object that ``text`` (str, or bytes of UTF-8) holds. ``what`` names it at the start of the GgufSdError
    raised for anything else and for more than ``most`` characters.

    Python's NaN and Infinity, which are no JSON, are read: diffusers writes them in settings that nobody here needs.
    """
    if not isinstance(text, str | bytes):
        raise GgufSdError(f"{what} is no JSON object but {shown(text)}")
    if len(text) > most:
        raise GgufSdError(f"{what} is {len(text):,} characters long; gguf-sd takes up to {most:,}")
    try:
        value = json.loads(text)
    except RecursionError:
        raise GgufSdError(f"{what} is no JSON object that can be read: it is nested too deeply") from None
    except ValueError as error:
        raise GgufSdError(f"{what} is no JSON object: {error}") from error
    if not isinstance(value, dict):
        raise GgufSdError(f"{what} is no JSON object but {shown(value)}")
    return value


def read_json_object(path: Path, most: int = MAX_SETTINGS) -> dict[str, Any]:
    """The JSON object in a file, as :func:`json_object`; raises OSError where the file cannot be read."""
    with open(path, "rb") as file:
        return json_object(file.read(most + 1), str(path), most)
