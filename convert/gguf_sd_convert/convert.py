"""The job: a checkpoint in, one GGUF file out."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
from torch import Tensor

from gguf_sd.adapters.lora import Lora, as_loras, requested
from gguf_sd.adapters.lora_file import lora_table
from gguf_sd.atomic_write import temporary_beside
from gguf_sd.checkpoint import inventory
from gguf_sd.checkpoint import metadata_keys as keys
from gguf_sd.checkpoint.check_tensors import strays_note
from gguf_sd.checkpoint.gguf_file import GGUFFile
from gguf_sd.checkpoint.hub_names import plain_name
from gguf_sd.checkpoint.part_files import missing_parts
from gguf_sd.checkpoint.tensor_names import UNET
from gguf_sd.config import SD15, SDXL, SDXL_TURBO, ModelConfig
from gguf_sd.errors import GgufSdError
from gguf_sd.prompt.find_tokenizer import ClipTokenizer, find_tokenizer, read_tokenizer, tokenizer_in_file
from gguf_sd_convert.base_model import base_model_keys
from gguf_sd_convert.calibrate.options import Calibration
from gguf_sd_convert.control import ControlJob, control_job
from gguf_sd_convert.encode import encode, outside_f16, read_twice
from gguf_sd_convert.hashing import hash_files
from gguf_sd_convert.inherit import inherited, known_hash, shape_keys
from gguf_sd_convert.merge_lora import merged
from gguf_sd_convert.progress import Progress, progress_bar
from gguf_sd_convert.quantize.policy import LAYOUTS, MIXED, SAME, TYPES, Stored, plan, text_type_name, type_name
from gguf_sd_convert.quantize.requantize import AUTO, file_type, own_layout, settled, type_label
from gguf_sd_convert.sources.diffusers_config import checked_config, read_model_config
from gguf_sd_convert.sources.entries import Entry, in_memory
from gguf_sd_convert.sources.source import Source, fitted, open_source
from gguf_sd_convert.workers import in_order, workers
from gguf_sd_convert.writer import GGUFSink, check_target, terminable
from gguf_sd_kernels.formats import FORMATS

if TYPE_CHECKING:
    from gguf_sd_convert.calibrate.job import Decided

PENDING_HASH = "0123456789abcdef" * 4  # stands in the header until the source is hashed


@dataclass(frozen=True)
class ConvertOptions:
    """``config``, a configuration or a diffusers folder that has one, describes a single file that is none of the known
    models; ``threads`` 0 = one a core."""

    type: str = "q8_0"  # one of quantize.policy.TYPES, in any case, or MIXED; of a GGUF source also SAME
    layout: str = "native"  # one of quantize.policy.LAYOUTS, or AUTO: a GGUF source's own, else what suits
    text_type: str = "f16"  # of the text encoders' matrices, one of quantize.policy.TEXT_TYPES
    ema: bool = False
    tokenizer: Path | None = None
    config: ModelConfig | Path | None = None
    force: bool = False
    threads: int = 0
    preset: str | None = None  # a key of PRESETS: whose schedule and defaults the file gets
    safety: bool = True  # takes the source's safety checker over, if it has one
    calibration: Calibration | None = None  # rounds for what the layers are fed, and chooses types for "mixed"
    loras: Sequence[Lora] = ()  # merged into the weights before they are quantised
    shared: bool = False  # the output is one that several processes may write at once, all the same: the cache
    unet_only: bool = False  # writes the UNet alone
    allow_requantize: bool = False  # of a GGUF source: blocks of any type may be decoded and quantised anew


PRESETS = {"sd15": SD15, "sdxl": SDXL, "sdxl-turbo": SDXL_TURBO}


@dataclass(frozen=True)
class ConvertReport:
    """What was written. Sizes in bytes; pairs are (tensors, bytes)."""

    source: str
    output: str
    architecture: str
    type: str
    layout: str
    nbytes: int
    f16_nbytes: int  # what the same file takes with its quantised tensors in F16
    types: dict[str, tuple[int, int]]
    kept: dict[str, tuple[int, int]]  # by the reason why tensors are not of the chosen type
    tokenizer: str
    sha256: str
    seconds: float
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Job:
    source: Source
    config: ModelConfig
    tokenizer: ClipTokenizer | None  # None: of a UNet alone
    tensors: dict[str, Entry]
    unused: list[str]
    options: ConvertOptions
    control: ControlJob | None = None  # what the source is, in place of a model


def convert(
    source: Path | str,
    output: Path | str,
    options: ConvertOptions | None = None,
    progress: Progress | None = None,
    quiet: bool = True,
) -> ConvertReport:
    """Converts a .safetensors, .ckpt or .gguf file or a diffusers folder to the GGUF file ``output``.

    The target appears whole or not at all. ``progress`` is called after each tensor; without it, and not ``quiet``,
    a bar is shown on stderr. Raises GgufSdError for every source, target and option that does not do.
    """
    options, output, started = options or ConvertOptions(), Path(output), time.perf_counter()
    options = check_options(options)
    inputs = [Path(source), options.tokenizer, options.config, *(lora.path for lora in options.loras)]
    if options.calibration is not None:
        inputs += [options.calibration.prompts, options.calibration.imatrix]
    check_target(output, options.force, [path for path in inputs if isinstance(path, Path)], options.shared)
    job = _prepare(Path(source), options)
    with ExitStack() as stack:
        if progress is None and not quiet:
            progress = stack.enter_context(progress_bar())
        decided = None if options.calibration is None else _decide(job, Path(source), output, progress)
        stored, nbytes, digest = _write(job, output, progress, decided)
    notes = decided.notes if decided else []
    return _report(job, output, stored, nbytes, digest, time.perf_counter() - started, notes)


def check_options(options: ConvertOptions) -> ConvertOptions:
    """The options with their names as the file will have them. Raises GgufSdError for what does not depend on the
    source."""
    if options.layout not in (*LAYOUTS, AUTO):
        raise GgufSdError(f"no layout {options.layout!r}; choose from {', '.join(LAYOUTS)}")
    if options.preset is not None and options.preset not in PRESETS:
        raise GgufSdError(f"no preset {options.preset!r}; choose from {', '.join(PRESETS)}")
    if options.threads < 0:
        raise GgufSdError(f"threads is {options.threads}; it takes 1 or more, or 0 for one a core")
    loras = requested(as_loras(options.loras), "", None)
    for lora in loras:
        lora_table(lora.path)
    qtype = type_name(options.type)
    if qtype == MIXED and options.calibration is None:
        options = replace(options, calibration=Calibration(compensate=False))
    if options.calibration is not None:
        from gguf_sd_convert.calibrate.job import check_calibration

        check_calibration(options.calibration, qtype)
    return replace(options, type=qtype, text_type=text_type_name(options.text_type), loras=loras)


def source_config(path: Path, options: ConvertOptions) -> ModelConfig:
    """The configuration that the conversion of ``path`` will carry, but for token ids: headers are read, no weights.
    Raises GgufSdError where ``path`` is no model that can be converted."""
    return _source(path, check_options(options)).config


def _source(path: Path, options: ConvertOptions) -> Source:
    config = options.config
    if isinstance(config, Path):
        if path.is_dir():
            raise GgufSdError(f"--config is for single files; the folder {path} has a configuration")
        config, _ = read_model_config(config, options.safety)
        config = replace(config, safety=None)  # of which a single file has no weights
    return _preset(open_source(path, options.ema, config, options.safety), options.preset)


def _prepare(path: Path, options: ConvertOptions) -> _Job:
    if (control := control_job(path, options)) is not None:
        none = ClipTokenizer("", "none: a ControlNet", 0, 0, 0, 0)
        source = Source(path, SD15, control.tensors, control.files, (), ())
        config = replace(SD15, name=control.config.name)
        native = replace(options, layout="native")
        return _Job(source, config, none, control.tensors, control.unused, native, control)
    source = _source(path, options)
    if options.type == SAME and source.metadata is None:
        raise GgufSdError(f"{path} is no GGUF file, which --type same is for; choose from {', '.join(TYPES)}")
    if options.layout == AUTO:
        options = replace(options, layout=auto_layout(source, options))
    if options.unet_only:
        source = _unet_of(source)
        tokenizer, config = None, source.config
        tensors, unused = fitted(source, inventory.unet_tensors(config))
    else:
        if source.metadata is not None and (missing := missing_parts(source.config, source.tensors)):
            what = "a UNet alone" if "clip_l" in missing else "no autoencoder"
            raise GgufSdError(
                f"{path} holds {what}; convert its UNet with --unet-only, or complete it by `gguf-sd pack` first"
            )
        tokenizer, config = _tokenizer(source, options)
        config = checked_config(config, path)
        tensors, unused = fitted(source, inventory.tensors(config))
    if options.loras:
        tensors, notes = merged(tensors, options.loras, config)
        files = (*source.files, *(lora.path for lora in options.loras))  # what the weights come from, for the hash
        source = replace(source, files=files, notes=(*source.notes, *notes))
    return _Job(source, config, tokenizer, tensors, unused, options)


def auto_layout(source: Source, options: ConvertOptions) -> str:
    """The layout of a GGUF source's blocks, else the smallest that those can read who are meant."""
    found = source.said.get(keys.LAYOUT)
    if source.metadata is not None and (own := own_layout(source.tensors.values())):
        return own
    if options.unet_only:
        return "linear" if found == "linear" else "comfy"
    if isinstance(found, str) and found in LAYOUTS:
        return found
    return "linear" if options.type == SAME else "native"


def _unet_of(source: Source) -> Source:
    """The source without its other parts."""
    tensors = {name: entry for name, entry in source.tensors.items() if name.startswith(UNET)}
    return replace(source, config=replace(source.config, safety=None), tensors=tensors)


def _preset(source: Source, preset: str | None) -> Source:
    """The source with the schedule and the defaults of a preset; a name that speaks of Turbo is a hint, no more."""
    config = source.config
    if preset is None:
        settled = config.name != "sdxl" or config.defaults.steps == SDXL_TURBO.defaults.steps
        if settled or "turbo" not in source.path.resolve().name.lower():
            return source
        hint = "its name speaks of Turbo, nothing else does: --preset sdxl-turbo gives the file 1 step without guidance"
        return replace(source, notes=(*source.notes, hint))
    chosen = PRESETS[preset]
    if chosen.name != config.name:
        raise GgufSdError(f"preset {preset} is for {chosen.name} models; {source.path} is {config.name}")
    return replace(source, config=replace(config, scheduler=chosen.scheduler, defaults=chosen.defaults))


def _tokenizer(source: Source, options: ConvertOptions) -> tuple[ClipTokenizer, ModelConfig]:
    """The tokenizer, and the config with the token ids that go with it."""
    texts = source.config.text
    if options.tokenizer is None and isinstance(own := source.said.get(keys.TOKENIZER), str):
        return tokenizer_in_file(own, source.path, texts[0]), source.config
    first = find_tokenizer(options.tokenizer, source.tokenizers[0] if source.tokenizers else None, texts[0])
    bos, eos = first.bos_token_id, first.eos_token_id
    new = [replace(text, bos_token_id=bos, eos_token_id=eos) for text in texts]
    new[0] = replace(new[0], pad_token_id=first.pad_token_id)
    if len(texts) == 2:
        new[1] = replace(new[1], pad_token_id=0)  # OpenCLIP's
    if len(source.tokenizers) == 2 and options.tokenizer is None:
        second = read_tokenizer(source.tokenizers[1], texts[1].vocab_size)
        if (second.size, second.bos_token_id, second.eos_token_id) != (first.size, bos, eos):
            raise GgufSdError(f"{source.path}: tokenizer and tokenizer_2 differ; gguf-sd takes one vocabulary for both")
        new[1] = replace(new[1], pad_token_id=second.pad_token_id)
    return first, replace(source.config, text=tuple(new))


def _decide(job: _Job, source: Path, output: Path, progress: Progress | None) -> Decided:
    """How the UNet's tensors are stored, from runs of the model: it is written in F16 beside the output meanwhile."""
    from gguf_sd_convert.calibrate.job import decide

    options = job.options
    assert options.calibration is not None
    if any(entry.blocks is not None for entry in job.tensors.values()):
        raise GgufSdError(f"{source} is quantised already; calibrate the original")
    whole = replace(options, type="f16", layout="native", text_type="f16", unet_only=False)
    whole = replace(whole, calibration=None, force=True, shared=True)
    with terminable(), temporary_beside(output) as full:
        convert(source, full, whole, progress)
        infos = GGUFFile(full).tensors.items()
        wide = {name for name, info in infos if info.type.name == "F32" and len(info.shape) > 1}

        def planned(own: dict[str, str]) -> list[Stored]:
            return _plan(job, wide, own)

        stored = [s for s in planned({}) if s.name.startswith(UNET) and s.type in FORMATS]
        beside = full.stat().st_size - sum(2 * prod(s.shape) for s in stored)
        return decide(full, source, planned, beside, options.type, options.calibration, progress)


def _plan(job: _Job, wide: Collection[str], own: Mapping[str, str]) -> list[Stored]:
    qtype = "q4_0" if job.options.type == MIXED else job.options.type
    return plan(_shapes(job.tensors), qtype, job.options.layout, wide, job.options.text_type, own)


def _write(
    job: _Job, output: Path, progress: Progress | None, decided: Decided | None
) -> tuple[list[Stored], int, str]:
    """Writes the file; returns what is in it, its size and the source's hash, taken on the side."""
    options, stop = job.options, threading.Event()
    tensors = job.tensors if decided is None else job.tensors | in_memory(decided.calibrated.biases)
    blocks = {} if decided is None else decided.calibrated.blocks
    known = known_hash(job.source, job.options.loras)
    with ThreadPoolExecutor(1) as hashing, workers(options.threads) as pool, ExitStack() as stack:
        stack.callback(stop.set)
        digest = hashing.submit(hash_files, () if known else job.source.files, stop)
        done = sum(entry.nbytes for entry in tensors.values() if read_twice(entry))
        total = done + sum(entry.nbytes for entry in tensors.values())
        wide = outside_f16(tensors, pool, progress, total)
        stored = _plan(job, wide, decided.types if decided else {})
        if job.source.metadata is not None:
            again = options.allow_requantize
            stored = settled(stored, tensors, options.type, options.layout, again, job.source.path)
        if options.type == SAME:
            job = replace(job, options=replace(options, type=type_label(stored, job.source.said)))
        architecture = "gguf_sd" if options.layout == "native" else job.config.name
        metadata = _metadata(job, stored) | (decided.metadata if decided else {})

        def task(t: Stored) -> Callable[[], Tensor]:
            return partial(blocks.pop, t.name) if t.name in blocks else partial(encode, t, tensors[t.name])

        jobs = ((tensors[t.name].nbytes, task(t)) for t in stored)
        with GGUFSink(output, architecture, metadata, stored, options.force) as sink:
            for tensor, data in zip(stored, in_order(jobs, pool), strict=True):
                sink.write(tensor.name, data)
                done += tensors[tensor.name].nbytes
                if progress:
                    progress(done, total, "converting")
            sink.patch(PENDING_HASH, known or digest.result())
        return stored, sink.nbytes, known or digest.result()


def _shapes(tensors: dict[str, Entry]) -> dict[str, tuple[int, ...]]:
    return {name: entry.shape for name, entry in tensors.items()}


def _metadata(job: _Job, stored: list[Stored]) -> dict[str, Any]:
    options, name = job.options, plain_name(job.source.path)
    if job.control is not None:
        return job.control.metadata(options.type, PENDING_HASH, stored)
    metadata: dict[str, Any] = {
        keys.NAME: name if job.source.path.is_dir() else Path(name).stem,
        keys.FILE_TYPE: file_type(options.type),
        keys.QUANTIZATION_VERSION: gguf.GGML_QUANT_VERSION,
        keys.FORMAT: keys.FORMAT_VERSION,
        keys.LAYOUT: options.layout,
        keys.TYPE: options.type,
        keys.CONFIG: json.dumps(asdict(job.config)),
        keys.SOURCE_NAME: name,
        keys.SOURCE_HASH: PENDING_HASH,
    }
    if job.tokenizer is not None:
        metadata[keys.TOKENIZER] = job.tokenizer.json
    metadata |= base_model_keys(job.source.path)
    metadata |= inherited(job.source, options.loras)
    return metadata | shape_keys(stored, options.layout)


def _report(
    job: _Job, output: Path, stored: list[Stored], nbytes: int, digest: str, seconds: float, told: Iterable[str] = ()
) -> ConvertReport:
    options, notes = job.options, [*job.source.notes, *told]
    if job.unused:
        notes.append(strays_note(job.unused, str(job.source.path)))
    wide = {tensor.name for tensor in stored if tensor.type == "F32"}
    as_f16 = sum(tensor.nbytes for tensor in plan(_shapes(job.tensors), "f16", options.layout, wide))
    return ConvertReport(
        source=str(job.source.path),
        output=str(output),
        architecture=job.config.name,
        type=type_label(stored, job.source.said) if options.type == SAME else options.type,
        layout=options.layout,
        nbytes=nbytes,
        f16_nbytes=nbytes - sum(tensor.nbytes for tensor in stored) + as_f16,
        types=_count((tensor.type, tensor) for tensor in stored),
        kept=_count((tensor.reason, tensor) for tensor in stored if tensor.reason),
        tokenizer=job.tokenizer.origin if job.tokenizer else "none: a UNet alone",
        sha256=digest,
        seconds=seconds,
        notes=notes,
    )


def _count(items: Iterable[tuple[str, Stored]]) -> dict[str, tuple[int, int]]:
    tensors: Counter[str] = Counter()
    nbytes: Counter[str] = Counter()
    for key, tensor in items:
        tensors[key] += 1
        nbytes[key] += tensor.nbytes
    return {key: (tensors[key], nbytes[key]) for key in sorted(nbytes, key=lambda k: -nbytes[k])}
