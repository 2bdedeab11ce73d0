"""What ``torch.save`` wrote, read without torch's unpickler: the pickle is a table that says which bytes of the file
are which tensor, and nothing else is believed of it.

Two layouts (https://docs.pytorch.org/docs/stable/notes/serialization.html): a zip archive, uncompressed, with
``data.pkl`` and a file for each storage under ``data/``; and the one before torch 1.6, five pickles and the storages
one after another, each behind its number of values.
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from gguf_sd.checkpoint.file_bytes import read_bytes
from gguf_sd.checkpoint.pickles import Call, ForbiddenNameError, Name, Persistent, PickleError, read_pickle
from gguf_sd.errors import GgufSdError
from gguf_sd.field_checks import called, shown
from gguf_sd.input_files import open_input

MAX_PICKLE = 16 << 20  # bytes; a full training checkpoint of SDXL has 1 MB
MAX_DIRECTORY = 8 << 20  # bytes of a zip archive's table of contents: 60,000 files
MAX_DIMS = 8
REBUILT = ("torch._utils._rebuild", "torch._tensor._rebuild")  # what makes tensors
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
STORAGES = {
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool, "Untyped": torch.uint8,
}  # fmt: skip
DTYPES = {str(dtype): dtype for dtype in (*STORAGES.values(), torch.float8_e4m3fn, torch.float8_e5m2)}
# What a tensor is that has other than plain values in a plain storage, by the function that makes it.
KINDS = {"sparse": "sparse", "qtensor": "quantised", "meta": "without data (meta)", "nested": "nested"}

Places = dict[str, tuple[int, int]]  # storage -> where it begins in the file, and its bytes


class _ForeignError(ValueError):
    """A tensor that is not taken; ``args[0]`` says why, as the end of "tensor x is …"."""


@dataclass(frozen=True)
class _Strided:
    """A tensor as strides over a storage. ``offset``, ``length`` count values: where the part begins that it touches,
    and how far that reaches."""

    dtype: torch.dtype
    storage: str
    offset: int
    length: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, read when it is asked for."""

    path: Path
    begin: int  # of the bytes that it touches
    strided: _Strided

    @property
    def shape(self) -> tuple[int, ...]:
        return self.strided.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.strided.dtype

    def load(self) -> Tensor:
        """Contiguous. Raises GgufSdError where the file has become shorter or cannot be read."""
        tensor = self.strided
        values = read_bytes(self.path, self.begin, tensor.length * tensor.dtype.itemsize).view(tensor.dtype)
        return values.as_strided(tensor.shape, tensor.stride).contiguous()


@dataclass(frozen=True)
class TorchFile:
    """``content``: what was saved, as :func:`gguf_sd.checkpoint.pickles.read_pickle` describes it."""

    path: Path
    content: Any
    places: Places

    @classmethod
    def open(cls, path: Path, what: str = "checkpoint") -> TorchFile:
        """Raises GgufSdError, which calls the file ``what``, for what is damaged or names Python code."""
        try:
            with open_input(path) as file:
                zipped = file.read(2) == b"PK"
                file.seek(0)
                return cls(path, *(_zipped(file, path) if zipped else _legacy(file, path)))
        except OSError as error:
            raise GgufSdError(f"cannot read {path}: {error.strerror}") from error
        except ForbiddenNameError as error:
            code = f"{path} holds Python code ({shown(error.args[0])[1:-1]}) and is refused"
            raise GgufSdError(f"{code}; get the {what} as .safetensors") from None
        except PickleError as error:
            raise GgufSdError(f"{path} is no {what}, or a damaged one: {error}") from None

    def tensors(self, values: Mapping[str, Any]) -> dict[str, StoredTensor]:
        """The tensors among values out of ``content``. Raises GgufSdError for those that are not plain values in the
        file."""
        return {name: tensor for name, value in values.items() if (tensor := self._tensor(name, value)) is not None}

    def _tensor(self, name: str, value: Any) -> StoredTensor | None:
        while isinstance(value, Call) and value.name.startswith("torch._utils._rebuild_parameter") and value.args:
            value = value.args[0]
        if not isinstance(value, Call) or not value.name.startswith(REBUILT):
            return None
        try:
            tensor = _strided(value, self.places)
        except _ForeignError as error:
            raise GgufSdError(
                f"{self.path}: tensor {called(name)} is {error}; gguf-sd takes plain values on the CPU: save the model "
                "so, or get it as .safetensors"
            ) from None
        return StoredTensor(self.path, self.places[tensor.storage][0] + tensor.offset * tensor.dtype.itemsize, tensor)


def kind_of(value: object) -> str:
    """What something in a description is, for a sentence."""
    return called(value.name) if isinstance(value, Call | Name) else type(value).__name__


class _Bounded(io.BufferedReader):
    """A file that reads no more at once than the largest table of contents has."""

    def read(self, size: int | None = -1) -> bytes:
        most = MAX_DIRECTORY + 1
        data = super().read(most if size is None or size < 0 else min(size, most))
        if len(data) > MAX_DIRECTORY:
            raise PickleError(f"its table of contents has more than {MAX_DIRECTORY:,} bytes")
        return data


def _zipped(file: BinaryIO, path: Path) -> tuple[Any, Places]:
    size = path.stat().st_size
    try:
        with _Bounded(io.FileIO(path)) as bounded, zipfile.ZipFile(bounded) as archive:
            members = {member.filename: member for member in archive.infolist()}
    except PickleError:
        raise
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, EOFError) as error:
        raise PickleError(f"its zip archive cannot be read ({error}); download it again") from None
    places = {name: place for name, member in members.items() if (place := _place(file, member, size))}
    root = next(
        (name.removesuffix("data.pkl") for name in places if name.count("/") == 1 and name.endswith("/data.pkl")), ""
    )
    if f"{root}data.pkl" not in places:
        raise PickleError("its zip archive holds no data.pkl")
    if f"{root}constants.pkl" in members:
        raise PickleError("it is a TorchScript program, not weights")
    if f"{root}byteorder" in places and _member(file, places[f"{root}byteorder"]) != b"little":
        raise PickleError("its values are big-endian, which is not read")
    content = read_pickle(io.BytesIO(_member(file, places[f"{root}data.pkl"])))
    folder = f"{root}data/"
    return content, {name.removeprefix(folder): place for name, place in places.items() if name.startswith(folder)}


def _place(file: BinaryIO, member: zipfile.ZipInfo, size: int) -> tuple[int, int] | None:
    """Where a member's bytes lie; None for one that is compressed, encrypted or reaches beyond the file."""
    if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1 or not 0 <= member.header_offset < size:
        return None
    file.seek(member.header_offset)
    local = file.read(30)
    if len(local) != 30 or local[:4] != b"PK\x03\x04":
        return None
    begin = member.header_offset + 30 + sum(struct.unpack("<HH", local[26:30]))
    return (begin, member.file_size) if begin + member.file_size <= size else None


def _member(file: BinaryIO, place: tuple[int, int]) -> bytes:
    begin, size = place
    if size > MAX_PICKLE:
        raise PickleError(f"its table of tensors has {size:,} bytes, up to {MAX_PICKLE:,} are read")
    file.seek(begin)
    return file.read(size)


def _legacy(file: BinaryIO, path: Path) -> tuple[Any, Places]:
    size = path.stat().st_size
    stream = io.BytesIO(file.read(MAX_PICKLE))
    magic, _, system = (read_pickle(stream) for _ in range(3))
    if magic != LEGACY_MAGIC:
        raise PickleError("it begins with no number of torch's")
    if isinstance(system, dict) and system.get("little_endian") is False:
        raise PickleError("its values are big-endian, which is not read")
    content, keys = read_pickle(stream), read_pickle(stream)
    if not isinstance(keys, list) or not all(type(key) is str for key in keys):
        raise PickleError("its list of storages is none")
    return content, dict(_after_one_another(file, stream.tell(), keys, content, size))


def _after_one_another(
    file: BinaryIO, begin: int, keys: list[str], content: Any, size: int
) -> Iterator[tuple[str, tuple[int, int]]]:
    """The storages behind the pickles. How large a value is only the tensors say that are made of them."""
    widths = dict(_widths(content))
    for key in keys:
        file.seek(begin)
        count = int.from_bytes(file.read(8), "little", signed=True)
        if key not in widths:
            raise PickleError(f"storage {shown(key)} belongs to no tensor that is understood")
        nbytes = count * widths[key]
        if not 0 <= nbytes <= size - begin - 8:
            raise PickleError(f"storage {shown(key)} ends behind the file; download it again")
        yield key, (begin + 8, nbytes)
        begin += 8 + nbytes


def _widths(content: Any) -> Iterator[tuple[str, int]]:
    """Bytes of a value for each storage that a tensor anywhere in the content lies in."""
    waiting, seen = [content], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, Persistent):
            with suppress(_ForeignError):
                key, dtype, _ = _storage(value)
                yield key, dtype.itemsize
        elif id(value) not in seen:
            seen.add(id(value))
            inner = value.args if isinstance(value, Call) else value
            if isinstance(inner, dict):
                waiting.extend(inner.values())
            elif isinstance(inner, list | tuple):
                waiting.extend(inner)


def _storage(value: Any) -> tuple[str, torch.dtype, int]:
    """Key, dtype and number of values of a storage."""
    key = value.key if isinstance(value, Persistent) else None
    if not isinstance(key, tuple) or len(key) < 5 or key[0] != "storage" or not isinstance(key[1], Name):
        raise _ForeignError("made of no storage")
    kind = key[1].name.removeprefix("torch.").removeprefix("storage.").removesuffix("Storage")
    if kind not in STORAGES:
        raise _ForeignError(f"made of {shown(key[1].name)}, which is not read")
    if key[3] == "meta":
        raise _ForeignError("without data (meta)")
    if type(key[2]) is not str or type(key[4]) is not int or key[4] < 0 or (len(key) > 5 and key[5] is not None):
        raise _ForeignError("made of a storage that is not read")
    return key[2], STORAGES[kind], key[4]


def _strided(call: Call, places: Places) -> _Strided:
    """``_rebuild_tensor`` takes storage, offset, size and stride; version 3 says the dtype of an untyped storage."""
    function = call.name.rpartition(".")[2]
    if function not in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3"):
        raise _ForeignError(next((kind for part, kind in KINDS.items() if part in function), f"made by {function}"))
    if len(call.args) < 4:
        raise _ForeignError("incomplete")
    (key, dtype, count), offset, shape, stride = _storage(call.args[0]), *call.args[1:4]
    if function.endswith("v3"):
        named = call.args[6] if len(call.args) > 6 else None
        if not isinstance(named, Name) or named.name not in DTYPES:
            raise _ForeignError(f"of the dtype {kind_of(named)}, which is not read")
        dtype, count = DTYPES[named.name], count // DTYPES[named.name].itemsize
    shape, stride = _whole(shape), _whole(stride)
    if len(shape) != len(stride) or type(offset) is not int or offset < 0:
        raise _ForeignError(f"damaged: its shape is {shown(shape)}, its stride {shown(stride)}")
    if key not in places or places[key][1] < count * dtype.itemsize:
        raise _ForeignError("damaged: its values are not in the file, or not all of them, or compressed")
    reach = sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) + 1
    length = reach if prod(shape) else 0
    if offset + length > count or prod(shape) > count:
        raise _ForeignError(f"damaged: its shape {shown(list(shape))} is larger than its storage of {count} values")
    return _Strided(dtype, key, offset, length, shape, stride)


def _whole(numbers: Any) -> tuple[int, ...]:
    """A shape or a stride, which are tuples, or torch.Size of one."""
    if isinstance(numbers, Call) and numbers.name == "torch.Size" and numbers.args:
        numbers = numbers.args[0]
    if not isinstance(numbers, tuple | list) or len(numbers) > MAX_DIMS:
        raise _ForeignError(f"damaged: its shape or stride is {kind_of(numbers)}")
    if not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
        raise _ForeignError("damaged: its shape or stride is negative or no numbers")
    return tuple(numbers)
