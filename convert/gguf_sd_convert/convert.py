"""The job: a checkpoint in, one GGUF file out."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
from torch import Tensor

from gguf_sd.atomic_write import temporary_beside
from gguf_sd.checkpoint import metadata_keys as keys
from gguf_sd.checkpoint.gguf_file import GGUFFile
from gguf_sd.checkpoint.hub_names import plain_name
from gguf_sd.checkpoint.tensor_names import UNET
from gguf_sd.errors import GgufSdError
from gguf_sd_convert.base_model import base_model_keys
from gguf_sd_convert.encode import encode, outside_f16, read_twice
from gguf_sd_convert.hashing import hash_files
from gguf_sd_convert.inherit import inherited, known_hash, shape_keys
from gguf_sd_convert.options import ConvertOptions, check_options
from gguf_sd_convert.prepare import Job, prepare
from gguf_sd_convert.progress import Progress, progress_bar
from gguf_sd_convert.quantize.policy import MIXED, SAME, Stored, plan
from gguf_sd_convert.quantize.requantize import file_type, settled, type_label
from gguf_sd_convert.report import ConvertReport, make_report, shapes
from gguf_sd_convert.sources.entries import in_memory
from gguf_sd_convert.target import check_target
from gguf_sd_convert.workers import in_order, workers
from gguf_sd_convert.writer import GGUFSink, terminable
from gguf_sd_kernels.formats import FORMATS

if TYPE_CHECKING:
    from gguf_sd_convert.calibrate.job import Decided

PENDING_HASH = "0123456789abcdef" * 4  # stands in the header until the source is hashed


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
    read = [path for path in inputs if isinstance(path, Path)]
    check_target(output, options.force, read, options.shared)
    if options.calibration is not None and (save := options.calibration.save) is not None:
        if save.resolve() == output.resolve():
            raise GgufSdError(f"{save} is where the model goes; choose another file for the calibration data")
        check_target(save, options.force, read, options.shared)
    job = prepare(Path(source), options)
    with ExitStack() as stack:
        if progress is None and not quiet:
            progress = stack.enter_context(progress_bar())
        decided = None if options.calibration is None else _decide(job, Path(source), output, progress)
        stored, nbytes, digest = _write(job, output, progress, decided)
    notes = decided.notes if decided else []
    return make_report(job, output, stored, nbytes, digest, time.perf_counter() - started, notes)


def _decide(job: Job, source: Path, output: Path, progress: Progress | None) -> Decided:
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


def _plan(job: Job, wide: Collection[str], own: Mapping[str, str]) -> list[Stored]:
    qtype = "q4_0" if job.options.type == MIXED else job.options.type
    return plan(shapes(job.tensors), qtype, job.options.layout, wide, job.options.text_type, own)


def _write(job: Job, output: Path, progress: Progress | None, decided: Decided | None) -> tuple[list[Stored], int, str]:
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


def _metadata(job: Job, stored: list[Stored]) -> dict[str, Any]:
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
