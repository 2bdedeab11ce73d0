"""A UNet and the parts that it takes, joined into one self-contained file. Nothing is quantised, decoded or rounded:
what lies in a part's file is copied byte for byte, under the names that whole models have."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import gguf
from torch import Tensor

from gguf_sd.checkpoint import inventory
from gguf_sd.checkpoint import metadata_keys as keys
from gguf_sd.checkpoint.file_bytes import read_bytes
from gguf_sd.checkpoint.gguf_header import TensorInfo, is_gguf
from gguf_sd.checkpoint.gguf_tensors import DTYPES
from gguf_sd.checkpoint.mapped_file import JoinedFile, MappedFile
from gguf_sd.checkpoint.model_file import ModelFile
from gguf_sd.checkpoint.part_files import PARTS, PartPaths, open_part
from gguf_sd.checkpoint.tensor_names import SAFETY, VAE
from gguf_sd.checkpoint.vae_file import full_vae
from gguf_sd.errors import GgufSdError
from gguf_sd.prompt.find_tokenizer import ClipTokenizer, find_tokenizer, tokenizer_in_file
from gguf_sd_convert.convert import PENDING_HASH
from gguf_sd_convert.hashing import hash_files
from gguf_sd_convert.inherit import shape_keys
from gguf_sd_convert.options import PRESETS
from gguf_sd_convert.progress import Progress, progress_bar
from gguf_sd_convert.quantize.policy import Stored
from gguf_sd_convert.quantize.requantize import file_type, type_label
from gguf_sd_convert.sources.diffusers_config import checked_config
from gguf_sd_convert.target import check_target
from gguf_sd_convert.workers import in_order, workers
from gguf_sd_convert.writer import GGUFSink


@dataclass(frozen=True)
class PackOptions:
    """``tokenizer``: a folder or a BPE merges file, for parts that carry none; ``preset``: whose schedule and defaults
    the file gets, a key of gguf_sd_convert.options.PRESETS."""

    tokenizer: Path | None = None
    preset: str | None = None
    force: bool = False


@dataclass(frozen=True)
class PackReport:
    """What was written, ``parts``: part -> the file that it came from. Sizes in bytes."""

    output: str
    architecture: str
    type: str
    layout: str
    nbytes: int
    tensors: int
    parts: dict[str, str]
    tokenizer: str
    seconds: float


def pack(
    unet: Path, parts: PartPaths, output: Path, options: PackOptions | None = None, quiet: bool = True
) -> PackReport:
    """Joins ``unet`` (.gguf or .safetensors, of a UNet or of more, whose other parts then serve) with ``parts`` into
    the GGUF file ``output``, which appears whole or not at all.

    Raises GgufSdError for parts that are missing, damaged or of another model, and for a target that cannot be."""
    options, started = options or PackOptions(), time.perf_counter()
    inputs = [unet, options.tokenizer, *parts.given.values()]
    check_target(output, options.force, [path for path in inputs if path is not None])
    model = _preset(_joined(unet, parts), options.preset)
    tokenizer = _tokenizer(model, options)
    stored = _plan(model)
    with ExitStack() as stack:
        progress = None if quiet else stack.enter_context(progress_bar())
        nbytes = _write(model, stored, tokenizer, output, options, progress)
    return PackReport(
        output=str(output),
        architecture=model.config.name,
        type=type_label(stored, model.file.metadata),
        layout=_layout(stored),
        nbytes=nbytes,
        tensors=len(stored),
        parts={"unet": str(unet)} | {part: str(path) for part, path in parts.given.items()},
        tokenizer=tokenizer.origin,
        seconds=time.perf_counter() - started,
    )


def _joined(unet: Path, parts: PartPaths) -> ModelFile:
    """The whole model, its tensors under canonical names in one order."""
    if is_gguf(unet):
        model = ModelFile.open(unet, parts)
    else:
        file = open_part(unet, "UNET")
        file.metadata = {}  # of a safetensors file, where keys mean nothing of ours
        model = ModelFile.of(file, None).with_parts(parts)
    if parts.vae is not None:
        model = _with_vae(model, parts.vae)
    model.check_whole()
    return replace(model, config=checked_config(model.config, unet))


def _with_vae(model: ModelFile, path: Path) -> ModelFile:
    """The model with the autoencoder of another file, its own where it has one let go."""
    what, option = PARTS["vae"]
    part = open_part(path, option)
    names, config = full_vae(part.path, {name: part.shape(name) for name in part.tensors}, model.config.vae)
    wanted, shapes = dict(inventory.vae(config)), {ours: part.shape(name) for ours, name in names.items()}
    if missing := [name for name in wanted if name not in names]:
        raise GgufSdError(f"{option}: {path} lacks {len(missing)} tensors of the {what}, the first is {missing[0]}")
    for name, shape in wanted.items():
        if prod(shapes[name]) != prod(shape):
            raise GgufSdError(
                f"{option}: {path} has {names[name]} of shape {list(shapes[name])}, it takes {list(shape)}"
            )
    same = "latent_channels", "downscale"
    if any(getattr(config, key) != getattr(model.config.vae, key) for key in same):
        raise GgufSdError(f"{option}: {path} is the {what} of another model family; give the one made for this model")
    places: dict[str, tuple[MappedFile, str]] = {
        canonical: (model.file, name) for canonical, name in model.names.items() if not canonical.startswith(VAE)
    }
    places |= {VAE + ours: (part, names[ours]) for ours in wanted}
    file = JoinedFile(model.file, places)
    return ModelFile(file, replace(model.config, vae=config), {name: name for name in places}, model.strays)


def _preset(model: ModelFile, preset: str | None) -> ModelFile:
    if preset is None:
        return model
    if preset not in PRESETS:
        raise GgufSdError(f"no preset {preset!r}; choose from {', '.join(PRESETS)}")
    chosen = PRESETS[preset]
    if chosen.name != model.config.name:
        raise GgufSdError(f"preset {preset} is for {chosen.name} models; {model.path} is {model.config.name}")
    return replace(model, config=replace(model.config, scheduler=chosen.scheduler, defaults=chosen.defaults))


def _tokenizer(model: ModelFile, options: PackOptions) -> ClipTokenizer:
    own, text = model.file.metadata.get(keys.TOKENIZER), model.config.text[0]
    if options.tokenizer is None and isinstance(own, str):
        return tokenizer_in_file(own, model.path, text)
    return find_tokenizer(options.tokenizer, None, text)


def _plan(model: ModelFile) -> list[Stored]:
    """Every tensor as it lies, in the order of the model's parts; plain values get the model's shape where the file has
    another of as many."""
    shapes = inventory.expected_tensors(model.config)
    order = {name: index for index, name in enumerate(shapes)}
    known = [name for name in model.names if name not in model.strays]
    if model.config.safety is None:
        known = [name for name in known if not name.startswith(SAFETY)]
    known.sort(key=lambda name: order.get(name, len(order)))
    return [_stored(model, name, shapes.get(name)) for name in known]


def _stored(model: ModelFile, canonical: str, wanted: tuple[int, ...] | None) -> Stored:
    name = model.names[canonical]
    info, shape, tap_major = model.file.tensors[name], model.file.shape(name), name in model.file.tap_major
    if info.quantized:
        return Stored(canonical, info.type.name, info.shape, shape, tap_major)
    shape = wanted if wanted is not None and prod(wanted) == prod(shape) else shape
    return Stored(canonical, _plain_type(info), shape, shape)


def _plain_type(info: TensorInfo) -> str:
    """GGUF has no float8."""
    return "F16" if info.type.name.startswith("F8") else info.type.name


def _layout(stored: list[Stored]) -> str:
    """Who can read the UNet as it lies."""
    reshaped = [tensor for tensor in stored if tensor.reshaped]
    return "native" if any(t.tap_major for t in reshaped) else "comfy" if reshaped else "linear"


def _said(model: ModelFile, key: str) -> str:
    value = model.file.metadata.get(key, "")
    return value if isinstance(value, str) else ""


def _write(
    model: ModelFile,
    stored: list[Stored],
    tokenizer: ClipTokenizer,
    output: Path,
    options: PackOptions,
    progress: Progress | None,
) -> int:
    """Writes the file; returns its size."""
    stop, done, total = threading.Event(), 0, sum(tensor.nbytes for tensor in stored)
    layout = _layout(stored)
    architecture = "gguf_sd" if layout == "native" else model.config.name
    metadata = _metadata(model, stored, tokenizer, layout)
    with ThreadPoolExecutor(1) as hashing, workers(0) as pool, ExitStack() as stack:
        stack.callback(stop.set)
        known = metadata[keys.SOURCE_HASH] != PENDING_HASH
        digest = hashing.submit(hash_files, () if known else sorted(set(_files(model.file))), stop)
        jobs = ((tensor.nbytes, partial(_data, *_place(model, tensor.name))) for tensor in stored)
        with GGUFSink(output, architecture, metadata, stored, options.force) as sink:
            for tensor, data in zip(stored, in_order(jobs, pool), strict=True):
                sink.write(tensor.name, data)
                done += tensor.nbytes
                if progress:
                    progress(done, total, "packing")
            if not known:
                sink.patch(PENDING_HASH, digest.result())
        return sink.nbytes


def _files(file: MappedFile) -> Iterator[Path]:
    if isinstance(file, JoinedFile):
        for one in file.files:
            yield from _files(one)
    else:
        yield file.path


def _place(model: ModelFile, canonical: str) -> tuple[Path, TensorInfo]:
    """The file in which a tensor lies, and where."""
    file, name = model.file, model.names[canonical]
    while isinstance(file, JoinedFile):
        file, name = file.places[name]
    return file.path, file.tensors[name]


def _data(path: Path, info: TensorInfo) -> Tensor:
    data = read_bytes(path, info.offset, info.nbytes)
    return data.view(DTYPES[info.type.name]).half() if info.type.name.startswith("F8") else data


def _metadata(model: ModelFile, stored: list[Stored], tokenizer: ClipTokenizer, layout: str) -> dict[str, Any]:
    said: Mapping[str, Any] = model.file.metadata
    kind = type_label(stored, model.file.metadata)
    name = model.path.stem
    metadata: dict[str, Any] = {
        keys.NAME: name,
        keys.FILE_TYPE: file_type(kind),
        keys.QUANTIZATION_VERSION: gguf.GGML_QUANT_VERSION,
        keys.FORMAT: keys.FORMAT_VERSION,
        keys.LAYOUT: layout,
        keys.TYPE: kind,
        keys.CONFIG: json.dumps(asdict(model.config)),
        keys.SOURCE_NAME: _said(model, keys.SOURCE_NAME) or model.path.name,
        keys.SOURCE_HASH: PENDING_HASH,
        keys.TOKENIZER: tokenizer.json,
    }
    if isinstance(said.get(keys.LORAS), str):
        metadata[keys.LORAS] = said[keys.LORAS]
    return metadata | shape_keys(stored, layout)
