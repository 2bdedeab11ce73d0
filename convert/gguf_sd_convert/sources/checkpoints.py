"""Weight files with their tensors, told apart by content: what is in them is known at once, a tensor is read when it is
asked for.

Sizes and offsets are checked against the file's size before anything is allocated, nothing in a file is executed, and
what has been read does not stay in memory.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from gguf_sd.checkpoint.file_bytes import read_bytes
from gguf_sd.checkpoint.safetensors_header import Stored, read_table
from gguf_sd.checkpoint.torch_file import TorchFile, kind_of
from gguf_sd.errors import GgufSdError
from gguf_sd.field_checks import shown
from gguf_sd.input_files import open_input
from gguf_sd.json_text import MAX_TABLE, read_json_object
from gguf_sd_convert.sources.entries import Checkpoint, Entry

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


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens a .safetensors or .ckpt file, told apart by content. Raises GgufSdError for anything else."""
    try:
        with open_input(path) as file:
            head = file.read(9)
    except OSError as error:
        raise GgufSdError(f"cannot read {path}: {error.strerror}") from error
    if head[:4] == b"GGUF":
        raise GgufSdError(f"{path} is a GGUF file already; convert takes .safetensors, .ckpt or a diffusers folder")
    if head[8:9] == b"{":  # first: the length before it may begin as a pickle does
        return open_safetensors(path)
    if head[:4] == b"PK\x03\x04" or head[:1] == b"\x80":
        return open_ckpt(path)
    if path.suffix == ".safetensors":
        return open_safetensors(path)
    raise GgufSdError(
        f"{path} is no checkpoint: it starts with {head[:8]!r}; convert takes .safetensors, .ckpt or a diffusers folder"
    )


def open_safetensors(path: Path) -> Checkpoint:
    """A .safetensors file. Raises GgufSdError where it is damaged, or a tensor of a dtype that torch here lacks."""
    table = read_table(path)
    entries = {name: _safetensors_entry(path, name, stored) for name, stored in table.tensors.items()}
    return Checkpoint(entries, (path,), table.metadata)


def _safetensors_entry(path: Path, name: str, stored: Stored) -> Entry:
    if (dtype := SAFETENSORS_DTYPES.get(stored.dtype)) is None:
        takes = ", ".join(SAFETENSORS_DTYPES)
        raise GgufSdError(f"{path}: tensor {name} is {stored.dtype}; convert takes {takes}")
    return Entry(stored.shape, dtype, partial(_load, path, stored, dtype))


def _load(path: Path, stored: Stored, dtype: torch.dtype) -> Tensor:
    return read_bytes(path, stored.offset, stored.nbytes).view(dtype).view(stored.shape)


def open_ckpt(path: Path) -> Checkpoint:
    """A file of ``torch.save``: the tensors of its ``state_dict``, or else its own. Raises GgufSdError for what is
    damaged, names Python code, or holds tensors that are not plain values in the file."""
    file = TorchFile.open(path)
    state = file.content.get("state_dict", file.content) if isinstance(file.content, dict) else file.content
    if not isinstance(state, dict):
        raise GgufSdError(f"{path} holds no state dict but {kind_of(state)}")
    entries = {name: Entry(x.shape, x.dtype, x.load) for name, x in file.tensors(state).items()}
    return Checkpoint(entries, (path,))


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
