"""Reading GGUF files, without trusting them.

The format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): magic, version, counts, metadata,
tensor table, then the data, each tensor aligned. Every count, offset and size is checked against the file's
size before it is used, so a damaged or hostile file costs an error message and no memory. Tensor data stays
memory-mapped: what is never touched is never read.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
import torch
from torch import Tensor

from gguf_sd.checkpoint.metadata_keys import COMFY_SHAPE, SHAPES
from gguf_sd.checkpoint.quant_tensor import QuantTensor
from gguf_sd.errors import GgufSdError
from gguf_sd.field_checks import shown
from gguf_sd.json_text import MAX_TABLE, json_object
from gguf_sd_kernels.formats import FORMATS

MAX_DIMS = 4
MAX_HEADER_ITEMS = 1 << 24  # tokens of a large vocabulary and then some
PLAIN_DTYPES = {
    gguf.GGMLQuantizationType.F32: torch.float32,
    gguf.GGMLQuantizationType.F16: torch.float16,
    gguf.GGMLQuantizationType.BF16: torch.bfloat16,
    gguf.GGMLQuantizationType.F64: torch.float64,
}
_SCALARS = {
    gguf.GGUFValueType.UINT8: "B",
    gguf.GGUFValueType.INT8: "b",
    gguf.GGUFValueType.UINT16: "H",
    gguf.GGUFValueType.INT16: "h",
    gguf.GGUFValueType.UINT32: "I",
    gguf.GGUFValueType.INT32: "i",
    gguf.GGUFValueType.FLOAT32: "f",
    gguf.GGUFValueType.BOOL: "?",
    gguf.GGUFValueType.UINT64: "Q",
    gguf.GGUFValueType.INT64: "q",
    gguf.GGUFValueType.FLOAT64: "d",
}


@dataclass(frozen=True)
class TensorInfo:
    """One row of the tensor table; ``shape`` in torch order, ``offset`` from the start of the file."""

    name: str
    type: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def quantized(self) -> bool:
        return self.type not in PLAIN_DTYPES


class GGUFFile:
    """A GGUF file's metadata and tensors. Raises GgufSdError for anything that is not a whole, sane GGUF."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        try:
            with open(self.path, "rb") as file:
                self._read(file)
        except OSError as error:
            raise GgufSdError(f"cannot read {self.path}: {error.strerror}") from error
        self._data: Tensor | None = None
        self._mapping: mmap.mmap | None = None
        self._tap_major: frozenset[str] = frozenset()
        self._shapes = self._logical_shapes()

    def _error(self, what: str) -> GgufSdError:
        return GgufSdError(f"{self.path} {what}")

    def _read(self, file: BinaryIO) -> None:
        self.size = file.seek(0, 2)
        file.seek(0)
        if (magic := file.read(4)) != b"GGUF":
            raise self._error(f"is not a GGUF file: it starts with {magic!r} instead of b'GGUF'")
        reader = _HeaderReader(file, self.size, self.path)
        (version,) = reader.unpack("I")
        if version not in (2, 3):
            hint = " (a big-endian file?)" if version > 0xFFFF else ""
            raise self._error(f"has GGUF version {version}{hint}; versions 2 and 3 are read")
        tensors, keys = reader.unpack("QQ")
        if tensors > MAX_HEADER_ITEMS or keys > MAX_HEADER_ITEMS:
            raise self._error(f"is damaged: it claims {tensors} tensors and {keys} metadata keys")
        for _ in range(keys):
            key = reader.string()
            self.metadata[key] = reader.value()
        table = [self._table_row(reader) for _ in range(tensors)]
        alignment = self.metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment > 1 << 20:
            raise self._error(f"is damaged: alignment {alignment!r}")
        start = -(-file.tell() // alignment) * alignment
        for name, kind, shape, offset, nbytes in table:
            if name in self.tensors:
                raise self._error(f"is damaged: two tensors are called {name}")
            if start + offset + nbytes > self.size:
                raise self._error(
                    f"is truncated: tensor {name} ends at byte {start + offset + nbytes}, "
                    f"the file at {self.size}; download or convert it again"
                )
            self.tensors[name] = TensorInfo(name, kind, shape, start + offset, nbytes)

    def _table_row(self, reader: _HeaderReader) -> tuple[str, gguf.GGMLQuantizationType, tuple[int, ...], int, int]:
        name = reader.string()
        (dims,) = reader.unpack("I")
        if not 0 <= dims <= MAX_DIMS:
            raise self._error(f"is damaged: tensor {name} has {dims} dimensions")
        shape = tuple(reversed(reader.unpack(f"{dims}Q")))
        number, offset = reader.unpack("IQ")
        try:
            kind = gguf.GGMLQuantizationType(number)
        except ValueError:
            raise self._error(f"holds tensor {name} in the unknown type {number}") from None
        block, size = gguf.GGML_QUANT_SIZES[kind]
        if prod(shape) > self.size * 256 or not all(shape) or (shape and shape[-1] % block):
            raise self._error(f"is damaged: tensor {name} of type {kind.name} has shape {list(shape)}")
        return name, kind, shape, offset, prod(shape) // block * size

    def _logical_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of tensors that lie reshaped in the file, from our metadata and ComfyUI-GGUF's."""
        shapes: dict[str, Any] = {}
        if SHAPES in self.metadata:
            shapes.update(self.json(SHAPES))
            self._tap_major = frozenset(shapes)
        shapes.update({k.removeprefix(COMFY_SHAPE): v for k, v in self.metadata.items() if k.startswith(COMFY_SHAPE)})
        result = {}
        for name, shape in shapes.items():
            info = self.tensors.get(name)
            if info is None:
                continue
            whole = isinstance(shape, list) and all(type(n) is int and n > 0 for n in shape)
            if not whole or prod(shape) != prod(info.shape):
                raise self._error(f"is damaged: {name} lies as {list(info.shape)} but claims shape {shown(shape)}")
            result[name] = tuple(shape)
        return result

    def json(self, key: str) -> dict[str, Any]:
        """The JSON object stored as text under ``key``."""
        return json_object(self.metadata[key], f"{self.path} has damaged metadata: {key}", MAX_TABLE)

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's logical shape, torch order."""
        return self._shapes.get(name, self.tensors[name].shape)

    def tensor(self, name: str) -> Tensor | QuantTensor:
        """The tensor, backed by the mapped file. Types outside gguf_sd_kernels.formats.FORMATS, and shapes whose
        rows are no whole number of blocks, are dequantised to F16 here."""
        info = self.tensors[name]
        raw = self._bytes(info)
        shape = self.shape(name)
        if not info.quantized:
            return raw.view(PLAIN_DTYPES[info.type]).view(shape)
        kind = FORMATS.get(info.type.name)
        if kind is None or len(shape) < 2 or prod(shape[1:]) % kind.block_size:
            return self._dequantized(info, raw).view(shape)
        return QuantTensor(raw.view(shape[0], -1), kind.name, shape, name in self._tap_major)

    def forget_pages(self) -> None:
        """Gives the memory behind everything read so far back; what is touched again is read again."""
        if self._mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._mapping.madvise(mmap.MADV_DONTNEED)

    def _bytes(self, info: TensorInfo) -> Tensor:
        if self._data is None:
            with open(self.path, "rb") as file:
                # A private mapping: torch wants writable memory, nothing ever writes to it.
                self._mapping = mmap.mmap(file.fileno(), self.size, access=mmap.ACCESS_COPY)
            self._data = torch.frombuffer(self._mapping, dtype=torch.uint8)
        raw = self._data[info.offset : info.offset + info.nbytes]
        return raw if info.offset % 8 == 0 else raw.clone()

    def _dequantized(self, info: TensorInfo, raw: Tensor) -> Tensor:
        """Any type gguf-py can decode, as F16."""
        try:
            values = gguf.quants.dequantize(raw.numpy().view(np.uint8), info.type)
        except NotImplementedError:
            raise self._error(f"holds tensor {info.name} as {info.type.name}, which cannot be read") from None
        return torch.from_numpy(np.ascontiguousarray(values)).to(torch.float16)


class _HeaderReader:
    """Takes values from the header and never reads past the end of the file."""

    def __init__(self, file: BinaryIO, size: int, path: Path):
        self.file, self.size, self.path = file, size, path

    def take(self, count: int) -> bytes:
        if count > self.size - self.file.tell():
            raise GgufSdError(
                f"{self.path} is truncated or damaged: its header wants {count} bytes at "
                f"{self.file.tell()} of {self.size}; download or convert it again"
            )
        return self.file.read(count)

    def unpack(self, fields: str) -> tuple[Any, ...]:
        layout = struct.Struct("<" + fields)
        return layout.unpack(self.take(layout.size))

    def string(self) -> str:
        (length,) = self.unpack("Q")
        return self.take(length).decode("utf-8", errors="replace")

    def value(self) -> Any:
        return self._typed(self.unpack("I")[0], depth=0)

    def _typed(self, number: int, depth: int) -> Any:
        try:
            kind = gguf.GGUFValueType(number)
        except ValueError:
            raise GgufSdError(f"{self.path} is damaged: metadata of unknown type {number}") from None
        if kind == gguf.GGUFValueType.STRING:
            return self.string()
        if kind != gguf.GGUFValueType.ARRAY:
            return self.unpack(_SCALARS[kind])[0]
        item, count = self.unpack("IQ")
        if depth > 2 or count > MAX_HEADER_ITEMS:
            raise GgufSdError(f"{self.path} is damaged: a metadata array of {count} items, depth {depth}")
        if code := _SCALARS.get(item):
            return list(self.unpack(f"{count}{code}"))
        return [self._typed(item, depth + 1) for _ in range(count)]
