"""Values that come out of files, held against a dataclass's declared types and ranges before anything is built.

A field says what it takes with ``Annotated``: ``steps: Annotated[int, Between(1, 10_000)]``. What depends on several
fields a class says in its ``check`` method, which raises ValueError.
"""

from __future__ import annotations

import math
import reprlib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Annotated, Any

LONG_NAME = 200  # characters of a stranger's name that a sentence takes as it is
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60


def shown(value: object) -> str:
    """A value for an error message: short, however long or deep it is."""
    return _SHORT.repr(value)


def called(text: str) -> str:
    """A name, or another program's message, for a sentence: as it is, unless it is long or could not be printed."""
    return text if len(text) <= LONG_NAME and text.isprintable() else shown(text)


@dataclass(frozen=True)
class Between:
    """A number from ``low`` to ``high``, both included."""

    low: float
    high: float

    def fits(self, value: Any) -> bool:
        return bool(self.low <= value <= self.high)

    def __str__(self) -> str:
        return f"from {self.low} to {self.high}"


@dataclass(frozen=True)
class Items:
    """A list of ``low`` to ``high`` items."""

    low: int
    high: int

    def fits(self, value: Any) -> bool:
        return self.low <= len(value) <= self.high

    def __str__(self) -> str:
        return f"of {self.low} to {self.high} items"


class OneOf:
    """One of a few values."""

    def __init__(self, *choices: object):
        self.choices = choices

    def fits(self, value: Any) -> bool:
        return value in self.choices

    def __str__(self) -> str:
        return "out of " + ", ".join(map(repr, self.choices))


Rule = Between | Items | OneOf
_KINDS = {int: "an integer", float: "a finite number", str: "a text", bool: "true or false"}


def checked(kind: Any, value: Any, name: str) -> Any:
    """``value``, as JSON gives it, as ``kind``: a type hint of int, float, bool, str, a dataclass, and of tuples and
    unions with None of them, each with Between, Items and OneOf in ``Annotated``.

    Raises ValueError with ``name`` (that of the field), the value and what is allowed.
    """
    rules: Sequence[Rule] = ()
    if typing.get_origin(kind) is Annotated:
        kind, *rules = typing.get_args(kind)
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        if value is None:
            return None
        (kind,) = (option for option in typing.get_args(kind) if option is not type(None))
        return checked(Annotated[kind, *rules] if rules else kind, value, name)
    result = _converted(kind, value, name, rules)
    if not all(rule.fits(result) for rule in rules):
        raise _refused(kind, value, name, rules)
    return result


def _converted(kind: Any, value: Any, name: str, rules: Sequence[Rule]) -> Any:
    if is_dataclass(kind) and isinstance(kind, type):
        return checked_fields(kind, value, name)
    if typing.get_origin(kind) is tuple:
        return _tuple(kind, value, name, rules)
    if kind is float and type(value) is int and abs(value) < 1 << 53:
        value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise _refused(kind, value, name, rules)
    return value


def _tuple(kind: Any, value: Any, name: str, rules: Sequence[Rule]) -> tuple[Any, ...]:
    inner = typing.get_args(kind)
    if not isinstance(value, list | tuple) or not all(rule.fits(value) for rule in rules):
        raise _refused(kind, value, name, rules)
    if inner[-1] is Ellipsis:
        inner = inner[:1] * len(value)
    if len(inner) != len(value):
        raise ValueError(f"{name} is {shown(value)}; it takes a list of {len(inner)} items")
    return tuple(checked(part, item, f"{name}[{i}]") for i, (part, item) in enumerate(zip(inner, value, strict=True)))


def _refused(kind: Any, value: Any, name: str, rules: Sequence[Rule]) -> ValueError:
    takes = _KINDS.get(kind, "a list")
    return ValueError(f"{name} is {shown(value)}; it takes {' '.join([takes, *map(str, rules)])}")


def checked_fields(cls: type, values: Any, name: str = "") -> Any:
    """A dataclass from a JSON object of its fields; what is left out gets its default.

    Raises ValueError for keys that it does not have, for values as :func:`checked` does, and for what its own
    ``check`` refuses.
    """
    what = name or cls.__name__
    if not isinstance(values, Mapping):
        raise ValueError(f"{what} is {shown(values)}; it takes a JSON object")
    hints = _hints(cls)
    if unknown := sorted(str(key) for key in values if key not in hints):
        raise ValueError(f"{what} has no field {shown(unknown[0])}; it has {', '.join(sorted(hints))}")
    prefix = f"{name}." if name else ""
    result = cls(**{key: checked(hints[key], value, prefix + key) for key, value in values.items()})
    try:
        getattr(result, "check", lambda: None)()
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from None
    return result


@cache
def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in fields(cls)}
