"""The header of a safetensors file, read without torch and without trusting it.

The format: u64 header length, JSON header, data (https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from gguf_sd.errors import GgufSdError
from gguf_sd.field_checks import called, shown
from gguf_sd.input_files import open_input
from gguf_sd.json_text import MAX_TABLE, json_object

MAX_DIMS = 8
MAX_NAME = 1000  # characters of a tensor's name; the longest that any program writes have 150
BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6,
    "F6_E3M2": 6, "C64": 64, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8,
    "BOOL": 8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as the header describes it; ``dtype`` in safetensors' words, ``shape`` in torch order, ``offset``
    from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    offset: int


@dataclass(frozen=True)
class Table:
    """What a header says."""

    size: int  # bytes of the whole file
    metadata: dict[str, str]
    tensors: dict[str, Stored]


def is_safetensors(path: Path) -> bool:
    """Told by content; a file that cannot be read is none."""
    try:
        with open_input(path) as file:
            start = file.read(9)
            # In a GGUF file the ninth byte is the lowest of the number of tensors: "{" where there are 123, 379, …
            return start[8:] == b"{" and not start.startswith(b"GGUF")
    except OSError:
        return False


def read_table(path: Path) -> Table:
    """Raises GgufSdError for a file that cannot be read, is damaged or truncated."""
    try:
        size = path.stat().st_size
        with open_input(path) as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(MAX_TABLE, size - 8):
                raise GgufSdError(
                    f"{path} is truncated or no safetensors file: its header claims {length} bytes, the file has "
                    f"{size}; download it again"
                )
            text = file.read(length)
    except OSError as error:
        raise GgufSdError(f"cannot read {path}: {error.strerror}") from error
    header = json_object(text, f"{path} is damaged: its safetensors header", MAX_TABLE)
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise GgufSdError(
            f"{path} is damaged: __metadata__ in its header is {shown(metadata)}; it takes an object of texts"
        )
    if (longest := max(map(len, header), default=0)) > MAX_NAME:
        raise GgufSdError(f"{path} is damaged: a tensor has a name of {longest:,} characters")
    tensors = {name: _stored(path, name, row, 8 + length, size) for name, row in header.items()}
    end, before = 0, ""
    for name, stored in sorted(tensors.items(), key=lambda item: item[1].offset):
        if stored.nbytes and stored.offset < end:
            raise GgufSdError(f"{path} is damaged: tensors {called(before)} and {called(name)} overlap")
        end, before = max(end, stored.offset + stored.nbytes), name
    return Table(size, metadata, tensors)


def _stored(path: Path, name: str, row: Any, start: int, size: int) -> Stored:
    try:
        kind, shape, (begin, end) = row["dtype"], tuple(row["shape"]), row["data_offsets"]
        bits = BITS[kind]
    except (KeyError, TypeError, ValueError):
        raise GgufSdError(f"{path} is damaged or too new: tensor {name} is described as {shown(row)}") from None
    sane = len(shape) <= MAX_DIMS and all(type(n) is int and n >= 0 for n in (*shape, begin, end))
    if not sane or (end - begin) * 8 != prod(shape) * bits:
        raise GgufSdError(
            f"{path} is damaged: tensor {name} {shown(kind)} {shown(list(shape))} has data offsets {shown(begin)} to "
            f"{shown(end)}"
        )
    if start + end > size:
        raise GgufSdError(
            f"{path} is truncated: tensor {name} ends at byte {start + end}, the file at {size}; download it again"
        )
    return Stored(kind, shape, end - begin, start + begin)
