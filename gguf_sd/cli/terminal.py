"""Text from files, made fit for a terminal."""

from __future__ import annotations


def printable(text: str, newlines: bool = True) -> str:
    """``text`` with everything that could steer a terminal, hide or reorder text (control characters, escape
    sequences, direction marks) written out as in a Python string; line breaks stay where ``newlines``."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or (newlines and c == "\n") else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
