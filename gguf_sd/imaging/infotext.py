"""AUTOMATIC1111's text of settings taken apart and put together: the prompt, ``Negative prompt: …``, then one line of
``key: value`` pairs.

Values that hold a separator stand in double quotes, as JSON. Prompts stand as they are there; one that would be read
back as something else (it holds a line ``Negative prompt:`` or ``Steps:`` of its own, or ends in blank lines) is
repeated among the pairs, quoted. Every function here is linear in the length of its text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

NEGATIVE = "Negative prompt:"
STEPS = "Steps:"
QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')
OWN_PROMPT, OWN_NEGATIVE = "Prompt", "Negative"  # keys of repeated prompts


def compose(prompt: str, negative: str | None, pairs: Mapping[str, object]) -> str:
    """The text of prompts and pairs; pairs that are None or "" are left out, the first must be ``Steps``."""
    filled = {key: str(value) for key, value in pairs.items() if value is not None and value != ""}
    text = _joined(prompt, negative, filled)
    if decompose(text)[:2] != (prompt, negative):
        filled[OWN_PROMPT] = json.dumps(prompt)
        if negative is not None:
            filled[OWN_NEGATIVE] = json.dumps(negative)
        text = _joined(prompt, negative, filled)
    return text


def _joined(prompt: str, negative: str | None, pairs: Mapping[str, str]) -> str:
    lines = [prompt] if negative is None else [prompt, f"{NEGATIVE} {negative}".rstrip(" ")]
    return "\n".join([*lines, ", ".join(f"{key}: {quoted(value)}" for key, value in pairs.items())])


def quoted(value: str) -> str:
    """A value of a pair, in quotes where it holds what ends one; what is quoted already stays as it is."""
    if QUOTED.fullmatch(value) or not set(value) & set(',:\n"'):
        return value
    return json.dumps(value, ensure_ascii=False)


def decompose(text: str) -> tuple[str, str | None, dict[str, str]]:
    """Prompt, negative prompt (None where there is no such line) and pairs. Raises ValueError where there are none."""
    lines = text.strip().split("\n")
    last = next((i for i in range(len(lines) - 1, -1, -1) if lines[i].startswith(STEPS)), len(lines) - 1)
    pairs = read_pairs(lines[last])
    if "Steps" not in pairs:
        raise ValueError(f"no line of settings begins with 'Steps:', the last is {lines[-1][:80]!r}")
    begin = next((i for i in range(last) if lines[i].startswith(NEGATIVE)), None)
    prompt = "\n".join(lines[:last] if begin is None else lines[:begin])
    negative = None
    if begin is not None:
        negative = "\n".join([lines[begin].removeprefix(NEGATIVE).removeprefix(" "), *lines[begin + 1 : last]])
    if OWN_PROMPT in pairs:
        return pairs[OWN_PROMPT], pairs.get(OWN_NEGATIVE), pairs
    return prompt, negative, pairs


def read_pairs(line: str) -> dict[str, str]:
    """``key: value, key: "a, b"`` -> a dictionary, values without their quotes."""
    pairs: dict[str, str] = {}
    position, closed = 0, True
    while (colon := line.find(":", position)) >= 0:
        key = line[max(position, line.rfind(",", position, colon) + 1) : colon]
        start = colon + 1
        while start < len(line) and line[start] == " ":
            start += 1
        match = QUOTED.match(line, start) if closed and line.startswith('"', start) else None
        if match is None and line.startswith('"', start):
            closed = False  # no quote ends from here on: they are not looked for again
        comma = line.find(",", match.end() if match else start)
        end = comma if comma >= 0 else len(line)
        pairs[key.strip()] = _unquoted(match[0]) if match else line[start:end].strip()
        position = end + 1
    return pairs


def _unquoted(value: str) -> str:
    try:
        return str(json.loads(value))
    except ValueError:  # not JSON after all
        return value[1:-1]
