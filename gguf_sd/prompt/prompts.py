"""Prompt syntax as AUTOMATIC1111's web UI made it known: weighted parts, BREAK, prompts of any length.

``(x)`` weighs x by 1.1, ``[x]`` by 1/1.1, ``(x:1.3)`` by 1.3; they nest. A backslash makes a bracket or a backslash
plain text. ``BREAK`` begins a new chunk.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

ROUND, SQUARE = 1.1, 1 / 1.1  # what a pair of brackets multiplies weights by
BREAK = "BREAK"
TOKEN = re.compile(r"\\[\\()\[\]]|[(\[]|:\s*[+-]?(?:\d+\.?\d*|\.\d+)\s*\)|[)\]]|\bBREAK\b|[^\\()\[\]:B]+|.", re.DOTALL)


class Part(NamedTuple):
    """A stretch of the prompt with one weight. ``text`` is None for a BREAK."""

    text: str | None
    weight: float = 1.0


def parse(prompt: str) -> list[Part]:
    """The parts of a prompt in order; neighbours of equal weight are one part. A prompt without syntax is one part,
    character for character. Brackets that are never closed count to the end."""
    parts: list[Part] = []
    open_round: list[int] = []  # indices into parts at which brackets opened
    open_square: list[int] = []

    def weigh(start: int, factor: float) -> None:
        parts[start:] = [part._replace(weight=part.weight * factor) for part in parts[start:]]

    for token in TOKEN.findall(prompt):
        if token == "(":
            open_round.append(len(parts))
        elif token == "[":
            open_square.append(len(parts))
        elif token == ")" and open_round:
            weigh(open_round.pop(), ROUND)
        elif token == "]" and open_square:
            weigh(open_square.pop(), SQUARE)
        elif token[0] == ":" and token[-1] == ")" and open_round:
            weigh(open_round.pop(), float(token[1:-1]))
        elif token == BREAK:
            parts.append(Part(None))
        else:
            parts.append(Part(token[1] if token[0] == "\\" and len(token) == 2 else token))
    for start in open_round:
        weigh(start, ROUND)
    for start in open_square:
        weigh(start, SQUARE)
    return _joined(parts)


def _joined(parts: list[Part]) -> list[Part]:
    result: list[Part] = []
    for part in parts:
        last = result[-1] if result else None
        if last is not None and last.text is not None and part.text is not None and last.weight == part.weight:
            result[-1] = Part(last.text + part.text, last.weight)
        else:
            result.append(part)
    return result


TAG = re.compile(r"<(?:lora|lyco|hypernet):[^<>]*>")
SQUARE_PART = re.compile(r"(?<!\\)\[([^\[\]]*)\]")
NUMBER = re.compile(r"\s*(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*")


def unsupported(prompt: str) -> Iterator[str]:
    """A sentence for each kind of syntax of other programs in a prompt that is read as plain text here."""
    if tag := TAG.search(prompt):
        yield f"{_short(tag[0])} in the prompt loads nothing, it is read as text"
    inner = [(part[0], part[1]) for part in SQUARE_PART.finditer(prompt)]
    if edited := next((whole for whole, text in inner if ":" in text and NUMBER.fullmatch(text.rsplit(":")[-1])), None):
        yield f"{_short(edited)} in the prompt does not change it while it is painted, it is read as text"
    if alternating := next((whole for whole, text in inner if "|" in text), None):
        yield f"{_short(alternating)} in the prompt does not alternate, it is read as text"


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:59] + "…"
