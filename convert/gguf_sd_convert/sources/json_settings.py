"""Reading the JSON files of a diffusers folder; what is refused is refused by file, setting and value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gguf_sd.errors import GgufSdError
from gguf_sd.field_checks import shown
from gguf_sd.json_text import read_json_object

LARGEST = 1 << 31  # of any size or count


def read_json(path: Path) -> dict[str, Any]:
    """The settings in a JSON file, and under "_path" where they come from."""
    try:
        return {**read_json_object(path), "_path": path}
    except OSError as error:
        raise GgufSdError(f"{path.parent.parent} is no whole diffusers folder: cannot read {path}") from error


def refusal(values: dict[str, Any], key: str, takes: str) -> GgufSdError:
    return GgufSdError(f"{values['_path']}: {key} is {shown(values.get(key))}; gguf-sd takes {takes}")


def check_fixed(values: dict[str, Any], fixed: dict[str, tuple[Any, ...]]) -> None:
    for key, allowed in fixed.items():
        if key in values and values[key] not in allowed:
            raise refusal(values, key, " or ".join(map(repr, allowed)))


def integers(values: dict[str, Any], key: str, default: Any, count: int) -> tuple[int, ...]:
    """A setting that is one positive integer for all levels, or a list of one each."""
    value = values.get(key, default)
    numbers = tuple(value) if isinstance(value, list | tuple) else (value,) * count
    if len(numbers) != count or not all(type(n) is int and 0 < n <= LARGEST for n in numbers):
        raise refusal(values, key, f"a positive integer or {count} of them")
    return numbers


def integer(values: dict[str, Any], key: str, default: Any, count: int = 1) -> int:
    """A positive integer; where diffusers takes a list too, all of it must be the same."""
    numbers = integers(values, key, default, count)
    if len(set(numbers)) != 1:
        raise refusal(values, key, "the same value at every level")
    return numbers[0]


def boolean(values: dict[str, Any], key: str, default: bool) -> bool:
    value = values.get(key, default)
    if not isinstance(value, bool):
        raise refusal(values, key, "true or false")
    return value
