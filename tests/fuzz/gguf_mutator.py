"""GGUF files that almost make sense: a real one taken apart, one or more things changed, and put together again."""

from __future__ import annotations

import json
import random
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf

STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
NUMBERS = (0, 1, 2, 3, 31, 33, 255, 4096, 2**16, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**48, 2**63 - 1, 2**63, 2**64 - 1)
TEXTS = (
    "",
    "\0",
    "\x1b[2J\x1b]0;owned\x07",
    "x" * 70000,
    "../../etc/passwd",
    "model.diffusion_model.",
    "{",
    "[" * 5000,
)


@dataclass
class Parts:
    """A file in pieces: (key, type, raw value), (name, shape as stored, type, offset), and what follows the header."""

    metadata: list[tuple[bytes, int, bytes]]
    tensors: list[tuple[bytes, tuple[int, ...], int, int]]
    data: bytes
    magic: bytes = b"GGUF"
    version: int = 3
    counts: tuple[int | None, int | None] = (None, None)  # None: the true one
    lengths: dict[int, int] = field(default_factory=dict)  # index of a key -> the length that it claims

    def to_bytes(self) -> bytes:
        tensors, keys = self.counts
        out = [self.magic, struct.pack("<I", self.version)]
        out.append(struct.pack("<QQ", _u64(tensors, len(self.tensors)), _u64(keys, len(self.metadata))))
        for index, (key, kind, value) in enumerate(self.metadata):
            out.append(struct.pack("<Q", self.lengths.get(index, len(key))) + key + struct.pack("<I", kind) + value)
        for name, shape, kind, offset in self.tensors:
            out.append(struct.pack("<Q", len(name)) + name + struct.pack("<I", len(shape)))
            out.append(struct.pack(f"<{len(shape)}QIQ", *shape, kind, offset))
        header = b"".join(out)
        return header + bytes(-len(header) % 32) + self.data


def _u64(value: int | None, true: int) -> int:
    return true if value is None else value


def text(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(raw)) + raw


def take_apart(path: Path) -> Parts:
    """A file that gguf-py reads, in pieces."""
    reader = gguf.GGUFReader(path)
    metadata = []
    for name, entry in reader.fields.items():
        if not name.startswith("GGUF."):
            raw = b"".join(part.tobytes() for part in entry.parts[3:])
            metadata.append((name.encode(), int(entry.types[0]), raw))
    tensors = []
    for tensor in reader.tensors:
        offset = tensor.data_offset - reader.data_offset
        tensors.append((tensor.name.encode(), tuple(map(int, tensor.shape)), int(tensor.tensor_type), offset))
    return Parts(metadata, tensors, path.read_bytes()[reader.data_offset :])


def mutated(parts: Parts, rng: random.Random) -> bytes:
    """The bytes of a file with one to three things wrong."""
    copy = Parts(list(parts.metadata), list(parts.tensors), parts.data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        rng.choice(MUTATIONS)(copy, rng)
    raw = copy.to_bytes()
    if rng.random() < 0.15:
        raw = raw[: rng.randrange(len(raw))]
    if rng.random() < 0.15:
        end = min(len(raw), 4000)
        at = rng.randrange(end) if end else 0
        raw = raw[:at] + rng.randbytes(rng.choice((1, 2, 8))) + raw[at + 1 :]
    return raw


def _number(rng: random.Random) -> int:
    return rng.choice(NUMBERS)


def _count(parts: Parts, rng: random.Random) -> None:
    parts.counts = (_number(rng), None) if rng.random() < 0.5 else (None, _number(rng))


def _version(parts: Parts, rng: random.Random) -> None:
    parts.version = _number(rng) % 2**32


def _magic(parts: Parts, rng: random.Random) -> None:
    parts.magic = rng.randbytes(4)


def _key_length(parts: Parts, rng: random.Random) -> None:
    parts.lengths[rng.randrange(len(parts.metadata))] = _number(rng)


def _value(parts: Parts, rng: random.Random) -> None:
    index = rng.randrange(len(parts.metadata))
    parts.metadata[index] = (parts.metadata[index][0], *any_value(rng))


def any_value(rng: random.Random, depth: int = 0) -> tuple[int, bytes]:
    """A metadata type, not always one that exists, and a value, not always its own."""
    kind = rng.choice((*SCALARS, STRING, STRING, ARRAY, 13, 200))
    if kind == STRING:
        return kind, text(rng.choice(TEXTS)) if rng.random() < 0.8 else struct.pack("<Q", _number(rng))
    if kind == ARRAY:
        item = rng.choice((*SCALARS, STRING, ARRAY, 99))
        count = _number(rng) if rng.random() < 0.5 else 3
        body = b"".join(any_value(rng, depth + 1)[1] for _ in range(3)) if depth < 3 else b""
        return kind, struct.pack("<IQ", item, count) + body
    code = SCALARS.get(kind, "I")
    size = struct.calcsize("<" + code)
    return kind, rng.choice((bytes(size), b"\xff" * size, rng.randbytes(size)))


def _drop_key(parts: Parts, rng: random.Random) -> None:
    del parts.metadata[rng.randrange(len(parts.metadata))]


def _twice(parts: Parts, rng: random.Random) -> None:
    if rng.random() < 0.5:
        parts.metadata.append(rng.choice(parts.metadata))
    else:
        parts.tensors.append(rng.choice(parts.tensors))


def _tensor(parts: Parts, rng: random.Random) -> None:
    index = rng.randrange(len(parts.tensors))
    name, shape, kind, offset = parts.tensors[index]
    what = rng.randrange(4)
    if what == 0:
        name = rng.choice((text_name(rng), name[: len(name) // 2], rng.randbytes(5)))
    elif what == 1:
        shape = rng.choice(((), (1,), shape[::-1], (*shape, 1), (_number(rng),), tuple(_number(rng) for _ in shape)))
    elif what == 2:
        kind = rng.choice((*range(0, 42), 255, 2**32 - 1))
    else:
        offset = _number(rng)
    parts.tensors[index] = name, shape, kind, offset


def text_name(rng: random.Random) -> bytes:
    return rng.choice(TEXTS).encode()


def _drop_tensor(parts: Parts, rng: random.Random) -> None:
    del parts.tensors[rng.randrange(len(parts.tensors))]


def _short_data(parts: Parts, rng: random.Random) -> None:
    parts.data = parts.data[: rng.randrange(len(parts.data))]


def _config(parts: Parts, rng: random.Random) -> None:
    """One value of the JSON that the file carries, anywhere in it."""
    for index, (key, kind, raw) in enumerate(parts.metadata):
        if key == b"gguf_sd.config":
            try:
                values = json.loads(raw[8:])
            except (ValueError, RecursionError):  # it was mutated before
                return
            if not isinstance(values, dict):
                return
            parts.metadata[index] = key, kind, text(mutated_json(values, rng))


def mutated_json(values: Any, rng: random.Random) -> str:
    """JSON text with a value replaced, or with something else wrong; ``values`` stay as they are."""
    if rng.random() < 0.05:
        return rng.choice(("", "null", "[]", "{", "[" * 100000, '{"unet": ' * 2000, "NaN", '"' + "x" * 100000 + '"'))
    values = json.loads(json.dumps(values))
    places = list(_places(values))
    holder, key = rng.choice(places)
    if rng.random() < 0.1:
        holder[f"{key}x" if isinstance(holder, dict) else 0] = 1
    elif isinstance(holder, dict) and rng.random() < 0.1:
        del holder[key]
    else:
        holder[key] = nasty(rng)
    return json.dumps(values)


def nasty(rng: random.Random) -> Any:
    """A value that a field does not expect, or hardly."""
    simple = (None, True, -1, 0, 1, 2, 3, 7, 3000, 2**31, 2**70, 0.5, -0.1, 1e308, float("nan"), float("inf"), "", "x")
    value: Any = rng.choice((*simple, "linear", [], {}, [1], [1, 2, 3, 4], ["x"], [None], [[1]], [0] * 1000, {"a": 1}))
    return [value, value] if rng.random() < 0.1 else value


def _places(values: Any) -> Any:
    """(holder, key) of everything inside."""
    items = values.items() if isinstance(values, dict) else enumerate(values)
    for key, value in list(items):
        yield values, key
        if isinstance(value, dict | list) and value:
            yield from _places(value)


MUTATIONS = (
    _count, _version, _magic, _key_length, _value, _value, _drop_key, _twice, _tensor, _tensor, _tensor, _drop_tensor,
    _short_data, _config, _config, _config, _config,
)  # fmt: skip
