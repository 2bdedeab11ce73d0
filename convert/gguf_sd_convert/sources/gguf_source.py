"""A GGUF file as a source: its tensors under canonical names, those in blocks with what it takes to copy them."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from gguf_sd.checkpoint import metadata_keys as keys
from gguf_sd.checkpoint.check_tensors import XL_TEXTS, text_names
from gguf_sd.checkpoint.file_bytes import read_bytes
from gguf_sd.checkpoint.gguf_file import GGUFFile
from gguf_sd.checkpoint.gguf_header import TensorInfo
from gguf_sd.checkpoint.gguf_tensors import DTYPES, as_tensor, dequantized
from gguf_sd.checkpoint.mapped_file import MappedFile
from gguf_sd.checkpoint.model_file import ModelFile, own_config
from gguf_sd.checkpoint.quant_tensor import QuantTensor
from gguf_sd.config import ModelConfig
from gguf_sd_convert.sources.entries import Blocks, Entry
from gguf_sd_kernels.formats import FORMATS


def gguf_model(path: Path, config: ModelConfig | None) -> ModelFile:
    """The model in a GGUF file, by its own configuration, ``config``, or what its tensors show. Raises GgufSdError."""
    file = GGUFFile(path)
    return ModelFile.of(file, own_config(file) if keys.CONFIG in file.metadata else config)


def gguf_entries(model: ModelFile) -> dict[str, Entry]:
    """Its tensors, by canonical name."""
    known = {canonical: name for canonical, name in model.names.items() if canonical not in model.strays}
    return {canonical: gguf_entry(model.file, name) for canonical, name in known.items()}


def second_text_encoder(model: ModelFile, entries: dict[str, Entry]) -> dict[str, Entry]:
    """SDXL's second text encoder where it has transformers' names, by those and without ``text_model.``; else none."""
    if len(model.config.text) < 2:
        return {}
    names = text_names(entries, 2, 1)
    return {} if "positional_embedding" in names else {local: entries[name] for local, name in names.items()}


def without_second_text_encoder(entries: dict[str, Entry]) -> dict[str, Entry]:
    return {name: entry for name, entry in entries.items() if not name.startswith(XL_TEXTS[1])}


def gguf_entry(file: MappedFile, name: str) -> Entry:
    """A tensor that is read when it is asked for, into memory of its own."""
    info, shape, tap_major = file.tensors[name], file.shape(name), name in file.tap_major
    load = partial(_load, file.path, info, shape, tap_major)
    if not info.quantized:
        return Entry(shape, DTYPES[info.type.name], load)
    read = partial(read_bytes, file.path, info.offset, info.nbytes)
    return Entry(shape, torch.float32, load, Blocks(info.type.name, info.shape, tap_major, read))


def _load(path: Path, info: TensorInfo, shape: tuple[int, ...], tap_major: bool) -> Tensor:
    raw = read_bytes(path, info.offset, info.nbytes)
    if info.quantized and (len(shape) < 2 or info.type.name not in FORMATS):
        return dequantized(raw, info, path).view(shape)
    stored = as_tensor(raw, info, shape, tap_major, path)
    return stored.dequantize(torch.float32).contiguous() if isinstance(stored, QuantTensor) else stored
