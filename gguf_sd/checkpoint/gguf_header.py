"""What stands before the data of a GGUF file: metadata and the tensor table, read without trusting them.

The format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): magic, version, counts, metadata, tensor table,
then the data, each tensor aligned. Counts, lengths and offsets are held against the file's size and against bounds that
no model comes near before anything is allocated, so a damaged or hostile file costs an error message and no memory.
"""

from __future__ import annotations

import os
import struct
import sys
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from gguf_sd.checkpoint.ggml_types import GGML_TYPES, PLAIN, GGMLType
from gguf_sd.errors import GgufSdError
from gguf_sd.field_checks import called
from gguf_sd.input_files import open_input

MAX_DIMS = 4
MAX_ENTRIES = 1 << 16  # tensors, and metadata keys: SDXL has 2,600, ComfyUI-GGUF adds a key for each convolution
MAX_NAME = 1 << 16  # bytes of a key or of a tensor's name
MAX_VALUE = 16 << 20  # bytes of one metadata value; the largest vocabularies have 10 MB
MAX_STRINGS = 1 << 19  # in one array: a vocabulary and then some
MAX_NESTED = 1 << 12  # arrays in arrays, in all
MAX_HEADER = 48 << 20  # bytes before the data
LONG_ARRAY = 16  # arrays of more items stay packed, in array.array and Texts: a list takes up to 60 bytes for each
DEFAULT_ALIGNMENT = 32

STRING, ARRAY = 8, 9  # numbers of the metadata types that are no scalars
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One row of the tensor table; ``shape`` in torch order, ``offset`` from the start of the file."""

    name: str
    type: GGMLType
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def quantized(self) -> bool:
        return self.type.name not in PLAIN


class Texts(Sequence[str]):
    """A long array of texts, as it lies in the file, each behind its length; taken apart when it is asked for."""

    def __init__(self, data: bytes, count: int):
        self._data, self._count = data, count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[str]:
        at = 0
        for _ in range(self._count):
            end = at + 8 + int.from_bytes(self._data[at : at + 8], "little")
            yield _text(self._data[at + 8 : end])
            at = end

    def __getitem__(self, index: Any) -> Any:
        return list(self)[index]


def _text(data: bytes) -> str:
    return data.decode("utf-8", errors="replace")


@dataclass(frozen=True)
class Header:
    """``metadata`` values are str, int, float, bool, lists of these, and array.array and Texts for long arrays."""

    size: int  # bytes of the whole file
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


def read_header(path: Path) -> Header:
    """Raises GgufSdError for files that cannot be read, and for anything that is not a whole, sane GGUF."""
    try:
        with open_input(path) as file:
            return _header(_Reader(file, path))
    except OSError as error:
        raise GgufSdError(f"cannot read {path}: {error.strerror}") from error


def is_gguf(path: Path) -> bool:
    """Told by the file's first bytes; what cannot be read is none."""
    try:
        with open_input(path) as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


def _header(reader: _Reader) -> Header:
    if (magic := reader.start()) != b"GGUF":
        raise reader.error(f"is not a GGUF file: it starts with {magic!r} instead of b'GGUF'")
    (version,) = reader.unpack("I")
    if version not in (2, 3):
        hint = " (a big-endian file?)" if version > 0xFFFF else ""
        raise reader.error(f"has GGUF version {version}{hint}; versions 2 and 3 are read")
    tensors, keys = reader.unpack("QQ")
    if tensors > MAX_ENTRIES or keys > MAX_ENTRIES:
        raise reader.error(f"is damaged: it claims {tensors} tensors and {keys} metadata keys")
    metadata: dict[str, Any] = {}
    for _ in range(keys):
        key = reader.string(MAX_NAME)
        metadata[key] = reader.value()
    rows = [_row(reader) for _ in range(tensors)]
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment.bit_count() != 1 or not 1 <= alignment <= 1 << 20:
        raise reader.error(f"is damaged: alignment {str(alignment)[:100]!r}")
    start = -(-reader.at // alignment) * alignment
    _check_apart(reader, rows, alignment)
    return Header(reader.size, metadata, _placed(reader, rows, start))


def _check_apart(reader: _Reader, rows: list[TensorInfo], alignment: int) -> None:
    """As the format has it, tensors begin at multiples of the alignment and share no bytes."""
    end, before = 0, ""
    for row in sorted(rows, key=lambda row: row.offset):
        if row.offset % alignment:
            raise reader.error(f"is damaged: tensor {called(row.name)} begins at {row.offset}, not aligned")
        if row.offset < end:
            raise reader.error(f"is damaged: tensors {called(before)} and {called(row.name)} overlap")
        end, before = row.offset + row.nbytes, row.name


def _row(reader: _Reader) -> TensorInfo:
    """A row of the tensor table; its offset counts from the start of the data."""
    name = reader.string(MAX_NAME)
    (dims,) = reader.unpack("I")
    if dims > MAX_DIMS:
        raise reader.error(f"is damaged: tensor {called(name)} has {dims} dimensions")
    shape = tuple(reversed(reader.unpack(f"{dims}Q")))
    number, offset = reader.unpack("IQ")
    if (kind := GGML_TYPES.get(number)) is None:
        raise reader.error(f"holds tensor {called(name)} in the unknown type {number}")
    values, row = prod(shape), shape[-1] if shape else 1  # a tensor without dimensions is one value
    if values == 0 or values > reader.size * kind.block_size or row % kind.block_size:
        raise reader.error(f"is damaged: tensor {called(name)} of type {kind.name} has shape {list(shape)}")
    return TensorInfo(name, kind, shape, offset, values // kind.block_size * kind.type_size)


def _placed(reader: _Reader, rows: list[TensorInfo], start: int) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for row in rows:
        end = start + row.offset + row.nbytes
        if row.name in tensors:
            raise reader.error(f"is damaged: two tensors are called {called(row.name)}")
        if end > reader.size:
            raise reader.error(
                f"is truncated: tensor {called(row.name)} ends at byte {end}, the file at {reader.size}; "
                "download or convert it again"
            )
        tensors[row.name] = TensorInfo(row.name, row.type, row.shape, start + row.offset, row.nbytes)
    return tensors


class _Reader:
    """Takes values from the header, never more than the file has or a bound allows."""

    def __init__(self, file: BinaryIO, path: Path):
        self.file, self.path = file, path
        self.size, self.at, self.nested = file.seek(0, 2), 0, 0

    def error(self, what: str) -> GgufSdError:
        return GgufSdError(f"{self.path} {what}")

    def start(self) -> bytes:
        self.file.seek(0)
        self.at = 4
        return self.file.read(4)

    def take(self, count: int, limit: int = MAX_VALUE) -> bytes:
        self._check(count, limit)
        data = self.file.read(count)
        if len(data) != count:
            raise self.error("became shorter while it was read; is it still being written?")
        self.at += count
        return data

    def _check(self, count: int, limit: int) -> None:
        if count > self.size - self.at:
            raise self.error(
                f"is truncated or damaged: its header wants {count} bytes at {self.at} of {self.size}; "
                "download or convert it again"
            )
        if count > limit or self.at + count > MAX_HEADER:
            raise self.error(
                f"is damaged: its header wants {count} bytes at {self.at}, where {limit} are read at most, and "
                f"{MAX_HEADER} in all; download or convert it again"
            )

    def unpack(self, fields: str) -> tuple[Any, ...]:
        layout = struct.Struct("<" + fields)
        return layout.unpack(self.take(layout.size))

    def string(self, limit: int = MAX_VALUE) -> str:
        (length,) = self.unpack("Q")
        return _text(self.take(length, limit))

    def value(self) -> Any:
        return self._typed(self.unpack("I")[0], depth=0)

    def _typed(self, number: int, depth: int) -> Any:
        if number == STRING:
            return self.string()
        if number == ARRAY:
            return self._array(depth)
        if (code := _SCALARS.get(number)) is None:
            raise self.error(f"is damaged: metadata of unknown type {number}")
        return self.unpack(code)[0]

    def _array(self, depth: int) -> Any:
        item, count = self.unpack("IQ")
        self.nested += depth > 0
        if self.nested > MAX_NESTED:
            raise self.error(f"is damaged: more than {MAX_NESTED} metadata arrays lie in arrays")
        if (code := _SCALARS.get(item)) is not None:
            return self._numbers(code, count)
        most = MAX_STRINGS if item == STRING else LONG_ARRAY
        if depth > 2 or count > most:
            raise self.error(f"is damaged: a metadata array of {count} items, depth {depth}")
        if count > LONG_ARRAY:
            return self._texts(count)
        return [self._typed(item, depth + 1) for _ in range(count)]

    def _texts(self, count: int) -> Texts:
        """Passes over them once to see where they end, then reads all at once."""
        start = self.at
        for _ in range(count):
            length = int.from_bytes(self.take(8), "little")
            self._check(length, MAX_VALUE)
            self.at = self.file.seek(length, os.SEEK_CUR)
        end, self.at = self.at, self.file.seek(start)
        return Texts(self.take(end - start, MAX_HEADER), count)

    def _numbers(self, code: str, count: int) -> Any:
        data = self.take(count * struct.calcsize("<" + code))
        if code == "?" and count <= LONG_ARRAY:
            return [byte != 0 for byte in data]
        values = array("B" if code == "?" else code, data)
        if sys.byteorder == "big":
            values.byteswap()
        return values.tolist() if count <= LONG_ARRAY else values
