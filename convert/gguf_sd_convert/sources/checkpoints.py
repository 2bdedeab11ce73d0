"""Lazy readers of weight files: what is in them is known at once, a tensor is read when it is asked for.

Sizes and offsets are checked against the file's size before anything is allocated, pickles are opened with
torch's weights-only unpickler, and what has been read does not stay in memory.
"""

from __future__ import annotations

import ctypes
import mmap
import pickle
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gguf_sd.errors import GgufSdError
from gguf_sd.field_checks import shown
from gguf_sd.json_text import MAX_TABLE, json_object, read_json_object

MAX_HEADER = MAX_TABLE  # bytes
SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
ITEM_SIZES = {name: torch.empty(0, dtype=dtype).element_size() for name, dtype in SAFETENSORS_DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor that can be read. ``load`` returns a contiguous tensor of this shape and dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of one or more weight files, under the names that stand there."""

    entries: dict[str, Entry]
    files: tuple[Path, ...]
    metadata: dict[str, str] = field(default_factory=dict)


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens a .safetensors or .ckpt file, told apart by content. Raises GgufSdError for anything else."""
    try:
        with open(path, "rb") as file:
            head = file.read(9)
    except OSError as error:
        raise GgufSdError(f"cannot read {path}: {error.strerror}") from error
    if head[:4] == b"GGUF":
        raise GgufSdError(f"{path} is a GGUF file already; convert takes .safetensors, .ckpt or a diffusers folder")
    if head[:4] == b"PK\x03\x04" or head[:1] == b"\x80":
        return _open_pickle(path, mapped=head[:2] == b"PK")
    if head[8:9] == b"{" or path.suffix == ".safetensors":
        return open_safetensors(path)
    raise GgufSdError(
        f"{path} is no checkpoint: it starts with {head[:8]!r}; convert takes .safetensors, .ckpt or a diffusers folder"
    )


def open_safetensors(path: Path) -> Checkpoint:
    """The format: u64 header length, JSON header, data (https://github.com/huggingface/safetensors)."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(MAX_HEADER, size - 8):
                raise GgufSdError(
                    f"{path} is truncated or no safetensors file: its header claims {length} bytes, "
                    f"the file has {size}; download it again"
                )
            header = json_object(file.read(length), f"{path} is damaged: its safetensors header", MAX_HEADER)
    except OSError as error:
        raise GgufSdError(f"cannot read {path}: {error.strerror}") from error
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise GgufSdError(
            f"{path} is damaged: __metadata__ in its header is {shown(metadata)}; it takes an object of texts"
        )
    entries = {name: _safetensors_entry(path, name, row, 8 + length, size) for name, row in header.items()}
    return Checkpoint(entries, (path,), metadata)


def _safetensors_entry(path: Path, name: str, row: Any, start: int, size: int) -> Entry:
    try:
        kind, shape, (begin, end) = row["dtype"], tuple(row["shape"]), row["data_offsets"]
        sane = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
        item = ITEM_SIZES[kind]
    except (KeyError, TypeError, ValueError):
        raise GgufSdError(f"{path} is damaged or too new: tensor {name} is described as {shown(row)}") from None
    if not sane or len(shape) > 8 or end - begin != prod(shape) * item:
        raise GgufSdError(
            f"{path} is damaged: tensor {name} {kind} {shown(list(shape))} has data offsets {shown(begin)} "
            f"to {shown(end)}"
        )
    if start + end > size:
        raise GgufSdError(
            f"{path} is truncated: tensor {name} ends at byte {start + end}, the file at {size}; download it again"
        )
    dtype = SAFETENSORS_DTYPES[kind]
    return Entry(shape, dtype, lambda: _read(path, start + begin, end - begin).view(dtype).view(shape))


def _read(path: Path, offset: int, nbytes: int) -> Tensor:
    buffer = torch.empty(nbytes, dtype=torch.uint8)
    view, done = buffer.numpy().data, 0
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        while done < nbytes:
            if not (count := file.readinto(view[done:])):
                raise GgufSdError(f"{path} ended at byte {offset + done} while it was read; is it still being written?")
            done += count
    return buffer


def open_sharded(index: Path) -> Checkpoint:
    """The shards that a ``*.safetensors.index.json`` names, which lie beside it."""
    try:
        places = read_json_object(index, MAX_TABLE).get("weight_map")
    except OSError as error:
        raise GgufSdError(f"cannot read {index}: {error.strerror}") from error
    if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
        raise GgufSdError(
            f"{index} is no index of safetensors shards: its weight_map is {shown(places)}; it takes an object of texts"
        )
    shards = sorted(set(places.values()))
    if any(Path(shard).name != shard for shard in shards):
        raise GgufSdError(f"{index} names a shard outside its folder")
    opened = {shard: open_safetensors(index.parent / shard) for shard in shards}
    entries = {}
    for name, shard in places.items():
        if name not in opened[shard].entries:
            raise GgufSdError(f"{index} places tensor {name} in {shard}, which does not hold it")
        entries[name] = opened[shard].entries[name]
    return Checkpoint(entries, (index, *(index.parent / shard for shard in shards)))


class _Inert:
    """Stands in for the few harmless classes that training frameworks leave in checkpoints; does nothing."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


HARMLESS_GLOBALS = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.utilities.cloud_io.load",
    "numpy.core.multiarray.scalar",
    "numpy.dtype",
)


def _open_pickle(path: Path, mapped: bool) -> Checkpoint:
    stubs: list[Any] = [(type("Inert", (_Inert,), {}), name) for name in HARMLESS_GLOBALS]
    try:
        with torch.serialization.safe_globals(stubs):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"Python code ({found[1]})" if found else "something other than tensors"
        raise GgufSdError(f"{path} holds {what} and is refused; get the model as .safetensors") from error
    except Exception as error:  # torch raises RuntimeError, EOFError, KeyError … for files that are damaged
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise GgufSdError(f"{path} is no checkpoint, or a damaged one: {reason}") from error
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise GgufSdError(f"{path} holds no state dict but {type(content).__name__}")
    tensors = {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
    return Checkpoint({name: _mapped_entry(value, mapped) for name, value in tensors.items()}, (path,))


def _mapped_entry(tensor: Tensor, mapped: bool) -> Entry:
    def load() -> Tensor:
        if not mapped:
            return tensor.detach().contiguous()
        copy = tensor.detach().clone(memory_format=torch.contiguous_format)
        _forget_pages(tensor)
        return copy

    return Entry(tuple(tensor.shape), tensor.dtype, load)


def _forget_pages(tensor: Tensor) -> None:
    """Gives the pages behind a tensor of a mapped file back; they are read again if they are needed again."""
    if not sys.platform.startswith("linux"):
        return
    storage, page = tensor.untyped_storage(), mmap.PAGESIZE
    start = -(-storage.data_ptr() // page) * page
    length = (storage.data_ptr() + storage.nbytes() - start) // page * page
    if length > 0:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_DONTNEED)
