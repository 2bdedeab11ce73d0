"""From rows to pictures: names, seeds, and which of them are painted at once.

All of it follows from the rows and the run's settings alone, whatever is already painted and whoever paints: so the
pictures are the same bytes after an interruption, and on one machine or many.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gguf_sd.batch.rows import PATHS, Row
from gguf_sd.errors import GgufSdError
from gguf_sd.field_checks import shown
from gguf_sd.request import MAX_SEED, RANDOM_SEED

MAX_PICTURES = 1_000_000
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_. -]{0,99}")
OWN = ("prompt", "negative_prompt", "name", "seed", "count")  # what pictures painted at once may differ in


@dataclass(frozen=True)
class Item:
    """One picture. ``settings``: keywords of :class:`gguf_sd.request.Request`, images as paths. ``error``: why it
    cannot be painted at all."""

    row: int
    picture: int  # of its row, from 1
    file: str
    seed: int
    settings: Mapping[str, Any]
    error: str = ""

    def key(self, model: str) -> str:
        """What tells this picture from one of other settings, ``model`` being what stands for the model and how it
        computes. Pictures and LoRAs are known by time and size, as files that are read."""
        read = [*(self.settings.get(name) for name in PATHS), *map(str, self.settings.get("loras", ()))]
        facts = [model, self.seed, self.error, self.settings, [_stamp(str(path)) for path in read if path]]
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _stamp(path: str) -> list[int]:
    head, _, weight = path.rpartition(":")
    for name in (path, head if weight.replace(".", "").lstrip("-").isdigit() else path):
        try:
            stat = Path(name).stat()
            return [stat.st_size, stat.st_mtime_ns]
        except (OSError, ValueError):  # not there: painting says so
            continue
    return []


def make_items(rows: Sequence[Row], defaults: Mapping[str, Any], seed: int = 0) -> list[Item]:
    """The pictures of the rows, in order. ``defaults`` serve where a row says nothing; rows without a seed count on
    from ``seed``, picture by picture. Raises GgufSdError for too many of them."""
    digits = max(5, len(str(len(rows))))
    used: dict[str, int] = {}
    items: list[Item] = []
    for row in rows:
        settings = {**defaults, **row.values}
        stem, count = f"{row.number:0{digits}d}", 1
        try:
            if row.error:
                raise GgufSdError(row.error)
            stem, count = _name(settings.pop("name", stem)), _count(settings.pop("count", 1))
            first = _seed(settings.pop("seed", RANDOM_SEED))
            names = [f"{stem}.png" if count == 1 else f"{stem}-{k}.png" for k in range(1, count + 1)]
            if taken := next((used[name.lower()] for name in names if name.lower() in used), None):
                raise GgufSdError(f"the name {stem} is taken by row {taken}; give each row another one")
        except GgufSdError as error:
            stem = f"{row.number:0{digits}d}"
            items.append(Item(row.number, 1, f"{stem}.png", seed + len(items), {}, str(error)))
            continue
        if len(items) + count > MAX_PICTURES:
            raise GgufSdError(f"these are more than {MAX_PICTURES:,} pictures; cut the file into several")
        start = seed + len(items) if first == RANDOM_SEED else first
        for k, name in enumerate(names):
            used[name.lower()] = row.number
            items.append(Item(row.number, k + 1, name, (start + k) % (MAX_SEED + 1), settings))
    return items


def _name(value: Any) -> str:
    if not isinstance(value, str) or not NAME.fullmatch(value):
        raise GgufSdError(f"name is {shown(value)}; it takes up to 100 letters, digits, and . _ - or spaces between")
    return value[:-4] if value.lower().endswith(".png") and len(value) > 4 else value


def _count(value: Any) -> int:
    if type(value) is not int or not 1 <= value <= MAX_PICTURES:
        raise GgufSdError(f"count is {shown(value)}; it takes a whole number from 1")
    return value


def _seed(value: Any) -> int:
    if type(value) is not int or not RANDOM_SEED <= value <= MAX_SEED:
        raise GgufSdError(f"seed is {shown(value)}; it takes a whole number from 0 to {MAX_SEED}")
    return value


def make_groups(items: Iterable[Item], size: int) -> list[list[Item]]:
    """The pictures that are painted at once: up to ``size``, of equal settings. Those that start from a picture go
    with others of their row alone. Items with an error are left out."""
    open_groups: dict[str, list[Item]] = {}
    groups: list[list[Item]] = []
    for item in (item for item in items if not item.error):
        own = item.row if item.settings.get("image") else None
        shape = {name: value for name, value in item.settings.items() if name not in OWN}
        key = json.dumps([own, shape], sort_keys=True, default=str)
        group = open_groups.get(key)
        if group is None or len(group) >= size:
            group = open_groups[key] = []
            groups.append(group)
        group.append(item)
    return groups


def as_json(group: Sequence[Item]) -> str:
    """A group as a text that travels."""
    return json.dumps([{**vars(item), "settings": dict(item.settings)} for item in group], default=str)


def from_json(text: str) -> list[Item]:
    """The group that :func:`as_json` wrote."""
    return [Item(**values) for values in json.loads(text)]


def refused(items: Iterable[Item]) -> Iterator[Item]:
    """Those that cannot be painted."""
    return (replace(item) for item in items if item.error)
