"""Text from files, made fit for a terminal, and streams that may be closed, full, or know no more than ASCII."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable

LONGEST_PATH = 4096  # bytes that Linux takes; a text given in place of a name may be longer


def printable(text: str, newlines: bool = True) -> str:
    """``text`` with everything that could steer a terminal, hide or reorder text (control characters, escape
    sequences, direction marks) written out as in a Python string; line breaks stay where ``newlines``."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or (newlines and c == "\n") else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def open_streams() -> None:
    """Standard streams that take everything. A closed one becomes the null device: otherwise the next file that is
    opened would get its number, and what some library prints would be written into that. What is printed on a terminal
    (names of files, say) cannot steer it."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
            if name == "stdout" and stream.isatty():  # bars are drawn on the other one
                stream.write = _printing(stream.write)  # type: ignore[method-assign]


def _printing(write: Callable[[str], int]) -> Callable[[str], int]:
    return lambda text: write(printable(text))


def complain(sentence: str) -> None:
    """Says what went wrong; where even that cannot be written, the exit code tells it alone."""
    with contextlib.suppress(OSError):
        print(f"gguf-sd: {printable(sentence, newlines=False)}", file=sys.stderr, flush=True)


def discard_output() -> None:
    """Sends what is still to be printed nowhere, so that Python does not complain of it at its end."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def of_the_system(error: OSError) -> str:
    """The sentence for an error of the operating system; output that is printed has no name."""
    reason = error.strerror or str(error)
    if error.filename is None:
        return f"cannot write the output: {reason}"
    from gguf_sd.field_checks import shown

    name = str(error.filename)
    return f"{name if len(name) <= LONGEST_PATH else shown(name)}: {reason}"
