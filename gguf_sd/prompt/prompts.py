"""Prompt syntax as AUTOMATIC1111's web UI made it known: weighted parts, BREAK, prompts of any length.

``(x)`` weighs x by 1.1, ``[x]`` by 1/1.1, ``(x:1.3)`` by 1.3; they nest. A backslash makes a bracket or a backslash
plain text. ``BREAK`` begins a new chunk.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import groupby
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
    texts: list[str | None] = []
    open_round: list[int] = []  # indices into texts at which brackets opened
    open_square: list[int] = []
    round_spans: list[Span] = []
    square_spans: list[Span] = []
    for token in TOKEN.findall(prompt):
        if token == "(":
            open_round.append(len(texts))
        elif token == "[":
            open_square.append(len(texts))
        elif token == ")" and open_round:
            round_spans.append(Span(open_round.pop(), len(texts), ROUND))
        elif token == "]" and open_square:
            square_spans.append(Span(open_square.pop(), len(texts), SQUARE))
        elif token[0] == ":" and token[-1] == ")" and open_round:
            round_spans.append(Span(open_round.pop(), len(texts), float(token[1:-1].strip())))
        elif token == BREAK:
            texts.append(None)
        else:
            texts.append(token[1] if token[0] == "\\" and len(token) == 2 else token)
    round_spans += [Span(start, len(texts), ROUND) for start in reversed(open_round)]
    square_spans += [Span(start, len(texts), SQUARE) for start in reversed(open_square)]
    weights = zip(_weights(round_spans, len(texts)), _weights(square_spans, len(texts)), strict=True)
    return _joined(Part(text, outer * inner) for text, (outer, inner) in zip(texts, weights, strict=True))


class Span(NamedTuple):
    """A pair of brackets around parts ``start`` to ``stop`` - 1."""

    start: int
    stop: int
    factor: float


def _weights(spans: list[Span], count: int) -> Iterator[float]:
    """The product of the factors around each part. ``spans`` nest, the inner before the outer."""
    waiting = list(spans)
    waiting.sort(key=lambda span: span.start, reverse=True)  # stable: of equal starts the outermost stays last
    around: list[tuple[int, float]] = [(count, 1.0)]  # where it ends, and the product so far
    for index in range(count):
        while around[-1][0] <= index:
            around.pop()
        while waiting and waiting[-1].start <= index:
            span = waiting.pop()
            if span.stop > index:
                around.append((span.stop, around[-1][1] * span.factor))
        yield around[-1][1]


def _joined(parts: Iterable[Part]) -> list[Part]:
    """Neighbours of equal weight as one; a BREAK stays alone."""
    result: list[Part] = []
    for (weight, is_break), group in groupby(parts, key=lambda part: (part.weight, part.text is None)):
        texts = [part.text or "" for part in group]
        result += [Part(None, weight)] * len(texts) if is_break else [Part("".join(texts), weight)]
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
