"""Pickles read as descriptions: nothing is imported, called or allocated that is not in the stream itself.

Python's pickle is a program for a small stack machine (https://docs.python.org/3/library/pickletools.html). Here the
machine runs on descriptions only: a name of Python's stays a name, a call stays a record of its arguments, and both
the stream and the number of its instructions are bounded. Keys of dictionaries other than texts are forgotten:
hashing what a stranger nested or chose can take for ever.
"""

from __future__ import annotations

import io
import pickletools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MAX_INSTRUCTIONS = 500_000  # a full training checkpoint of SDXL has 200,000
# What training leaves in checkpoints beside numbers, and does nothing here. Everything else is taken for an attack.
HARMLESS = re.compile(
    r"torch\.(\w*Storage|storage\.\w*Storage|Tensor|Size|device|nn\.parameter\.Parameter|serialization\._get_layout)"
    r"|torch\.(u?int[0-9]{1,2}|float[0-9]{1,2}|bfloat16|float8_\w+|bool|complex[0-9]{2,3}|per_\w+|q\w*int[0-9]{1,2})"
    r"|torch\._utils\._rebuild_\w+|torch\._tensor\._rebuild_from_type_v2"
    r"|torch\.nn\.modules\.container\.ParameterDict"
    r"|collections\.(OrderedDict|defaultdict|Counter)|_codecs\.encode|numpy\.(dtype|ndarray)"
    r"|numpy\._?core\.multiarray\.(scalar|_reconstruct)"
    r"|(builtins|__builtin__)\.(set|frozenset|dict|list|tuple|bytearray|complex|slice|int|float|object)"
    r"|(pytorch_lightning|lightning|lightning_fabric)(\.\w+)+"
)
_BY_ARGUMENT = ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING",
                "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES",
                "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8")  # fmt: skip
_EMPTY: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": list,
}


class PickleError(ValueError):
    """The stream is damaged, too long, or uses what no checkpoint needs."""


class ForbiddenNameError(PickleError):
    """The stream names something of Python's that no checkpoint needs; ``args[0]`` is the name."""


@dataclass(frozen=True, eq=False)
class Name:
    """A class or function, never looked up."""

    name: str


@dataclass(eq=False)
class Call:
    """What a name was called with, and what was then set on what it returned."""

    name: str
    args: tuple[Any, ...]
    state: Any = None


@dataclass(frozen=True, eq=False)
class Persistent:
    """Something outside the stream, by its identifier."""

    key: Any


def read_pickle(stream: io.BytesIO) -> Any:
    """The value that the next pickle in ``stream`` describes: texts, numbers, bytes, lists, tuples, dictionaries (of
    texts), Name, Call and Persistent. Raises PickleError."""
    machine = _Machine()
    try:
        for count, (instruction, argument, _) in enumerate(pickletools.genops(stream)):
            if count == MAX_INSTRUCTIONS:
                raise PickleError(f"it has more than {MAX_INSTRUCTIONS:,} instructions")
            machine.run(instruction.name, argument)
    except PickleError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, MemoryError) as error:
        raise PickleError(str(error)[:200] or type(error).__name__) from error
    return machine.pop()


class _Machine:
    """The stack, the marks on it, and what was memorised."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, name: str, argument: Any) -> None:
        if name in _BY_ARGUMENT:
            self.stack.append(argument)
        elif name in _EMPTY:
            self.stack.append(_EMPTY[name]())
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            self.stack.append(self.memo[argument])
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            self.memo[argument] = self.stack[-1]
        elif name not in ("PROTO", "FRAME", "STOP"):
            method = getattr(self, f"_{name.lower()}", None)
            if method is None:
                raise PickleError(f"it holds the instruction {name}, which no checkpoint needs")
            method() if argument is None else method(argument)

    def pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise PickleError("its stack is empty")
        return self.stack.pop()

    def _mark(self) -> None:
        self.marks.append(len(self.stack))

    def _since_mark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def _pop(self) -> None:
        self.pop()

    def _pop_mark(self) -> None:
        self._since_mark()

    def _dup(self) -> None:
        self.stack.append(self.stack[-1])

    def _memoize(self) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def _global(self, argument: str) -> None:
        self._named(argument.replace(" ", ".", 1))

    def _stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        self._named(f"{module}.{name}" if type(module) is type(name) is str else "something nameless")

    def _named(self, name: str) -> None:
        if not HARMLESS.fullmatch(name):
            raise ForbiddenNameError(name.removeprefix("builtins.").removeprefix("__builtin__."))
        self.stack.append(Name(name))

    def _reduce(self) -> None:
        arguments, function = self.pop(), self.pop()
        if type(function) is not Name or type(arguments) is not tuple:
            raise PickleError("it calls what is no name")
        made = Call(function.name, arguments)
        self.stack.append(_ordered(arguments) if function.name == "collections.OrderedDict" else made)

    _newobj = _reduce

    def _build(self) -> None:
        state = self.pop()
        if isinstance(made := self.stack[-1], Call):
            made.state = state

    def _binpersid(self) -> None:
        self.stack.append(Persistent(self.pop()))

    def _append(self) -> None:
        self._extend([self.pop()])

    def _appends(self) -> None:
        self._extend(self._since_mark())

    _additems = _appends

    def _extend(self, items: list[Any]) -> None:
        if isinstance(target := self.stack[-1], list):
            target.extend(items)

    def _setitem(self) -> None:
        value, key = self.pop(), self.pop()
        self._set([key, value])

    def _setitems(self) -> None:
        self._set(self._since_mark())

    def _set(self, items: list[Any]) -> None:
        if isinstance(target := self.stack[-1], dict):
            target.update(_texts_of(zip(items[::2], items[1::2], strict=True)))

    def _tuple(self) -> None:
        self.stack.append(tuple(self._since_mark()))

    def _tuple1(self) -> None:
        self._some(1)

    def _tuple2(self) -> None:
        self._some(2)

    def _tuple3(self) -> None:
        self._some(3)

    def _some(self, count: int) -> None:
        items = [self.pop() for _ in range(count)]
        self.stack.append(tuple(reversed(items)))

    _frozenset = _tuple

    def _list(self) -> None:
        self.stack.append(self._since_mark())

    def _dict(self) -> None:
        items = self._since_mark()
        self.stack.append(_texts_of(zip(items[::2], items[1::2], strict=True)))


def _texts_of(pairs: Any) -> dict[Any, Any]:
    return {key: value for key, value in pairs if type(key) is str}


def _ordered(arguments: tuple[Any, ...]) -> dict[Any, Any]:
    """An OrderedDict's pairs, where it was called with them."""
    pairs = arguments[0] if arguments and isinstance(arguments[0], list) else []
    return _texts_of(pair for pair in pairs if isinstance(pair, list | tuple) and len(pair) == 2)
