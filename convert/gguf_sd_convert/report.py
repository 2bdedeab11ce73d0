"""What a conversion tells of its result."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from gguf_sd.checkpoint.check_tensors import strays_note
from gguf_sd_convert.prepare import Job
from gguf_sd_convert.quantize.policy import SAME, Stored, plan
from gguf_sd_convert.quantize.requantize import type_label
from gguf_sd_convert.sources.entries import Entry


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


def shapes(tensors: Mapping[str, Entry]) -> dict[str, tuple[int, ...]]:
    """Of a job's tensors."""
    return {name: entry.shape for name, entry in tensors.items()}


def make_report(
    job: Job, output: Path, stored: list[Stored], nbytes: int, digest: str, seconds: float, told: Iterable[str] = ()
) -> ConvertReport:
    options, notes = job.options, [*job.source.notes, *told]
    if job.unused:
        notes.append(strays_note(job.unused, str(job.source.path)))
    wide = {tensor.name for tensor in stored if tensor.type == "F32"}
    as_f16 = sum(tensor.nbytes for tensor in plan(shapes(job.tensors), "f16", options.layout, wide))
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
