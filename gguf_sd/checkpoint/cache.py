"""Conversions that are kept: where they lie, under which key, and how they are listed and cleared.

A conversion is a GGUF file and, written after it, a record beside it (``NAME.gguf.json``). What has no record that fits
it is no conversion: one that was cut short, damaged or tampered with is made again. One record a file leaves nothing
for two processes to fight over; files appear whole, and of two equal ones the later stays.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from gguf_sd.atomic_write import put_in_place, temporary_beside
from gguf_sd.checkpoint.hub_names import plain_name
from gguf_sd.errors import GgufSdError
from gguf_sd.json_text import read_json_object
from gguf_sd_kernels.cache_folder import cache_folder
from gguf_sd_kernels.writers import remove_stale

CHUNK = 1 << 24  # bytes read at once
DAY = 86_400  # seconds
HASHES = "hashes.json"
WEIGHT_SUFFIXES = {".safetensors", ".ckpt", ".json", ".txt", ".bin"}
# Whose sources decide what a conversion looks like.
CONVERTER = ("gguf_sd_convert", "gguf_sd.checkpoint", "gguf_sd.config", "gguf_sd.prompt", "gguf_sd_kernels.formats")

Reading = Callable[[int], AbstractContextManager[Any]]  # bytes to be read -> a bar with an update method, or None


def _silent(total: int) -> AbstractContextManager[None]:
    return nullcontext()


@dataclass(frozen=True)
class Conversion:
    """A file in the cache. ``used``: seconds since 1970."""

    path: Path
    source: str  # the path it was made from; empty where no record says
    nbytes: int
    used: float


def made_folder() -> Path:
    """The cache's folder, created where it is not there, rid of what dead processes left. Raises GgufSdError."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GgufSdError(f"cannot create the cache {folder}: {error.strerror}; set GGUF_SD_CACHE") from error
    remove_stale(folder)
    return folder


@cache
def converter_version() -> str:
    """A hash of the converter's sources. A number would have to be raised by hand whenever output changes, and once
    forgotten the cache would be wrong; the price is that every new version converts again."""
    digest = hashlib.sha256()
    for name in CONVERTER:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise GgufSdError(f"the package {name} is not installed whole; install gguf-sd again")
        origin = Path(spec.origin)
        for path in sorted(origin.parent.rglob("*.py")) if spec.submodule_search_locations else [origin]:
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def conversion_path(
    model: Path, settings: Mapping[str, object], inputs: Sequence[Path], reading: Reading = _silent
) -> Path:
    """Where the conversion of ``model`` lies, or will. The name's key covers the contents of the model and of
    ``inputs`` (a tokenizer), the settings, and the converter's version."""
    folder = made_folder()
    contents = [content_hash(path, folder, reading) for path in (model, *inputs)]
    key = json.dumps([contents, dict(settings), converter_version()], sort_keys=True, default=str)
    stem, digest = Path(plain_name(model)).stem, hashlib.sha256(key.encode()).hexdigest()[:16]
    return folder / f"{stem}-{digest}-{settings['type']}.gguf"


def is_whole(path: Path) -> bool:
    """Whether a conversion is there as its record says; marks it as used now."""
    try:
        record = read_json_object(_record(path))
        whole = bool(record.get("bytes") == path.stat().st_size)
        if whole:
            os.utime(_record(path))
    except (OSError, GgufSdError):
        return False
    return whole


def keep(path: Path, source: Path) -> None:
    """Records a finished conversion."""
    _write_json(_record(path), {"source": str(source.resolve()), "bytes": path.stat().st_size})


def conversions() -> list[Conversion]:
    """Everything in the cache, the last used first."""
    found = []
    for path in cache_folder().glob("*.gguf"):
        try:
            stat, record = path.stat(), _record(path)
            used = record.stat().st_mtime if record.exists() else stat.st_mtime
        except OSError:  # cleared meanwhile
            continue
        found.append(Conversion(path, _source(record), stat.st_size, used))
    return sorted(found, key=lambda conversion: -conversion.used)


def clear(names: Sequence[str] = (), older_than: float | None = None) -> list[Conversion]:
    """Removes conversions: those of ``names`` (all, without), not used for ``older_than`` days; also what conversions
    that were killed left, once it is a day old. Returns what was removed; raises GgufSdError for a name not there."""
    found = conversions()
    if unknown := [name for name in names if not any(_is_called(c, name) for c in found)]:
        raise GgufSdError(f"the cache {cache_folder()} holds no {unknown[0]}; `gguf-sd cache` lists what it holds")
    if names:
        found = [c for c in found if any(_is_called(c, name) for name in names)]
    if older_than is not None:
        found = [c for c in found if time.time() - c.used >= older_than * DAY]
    for conversion in found:
        _remove((_record(conversion.path), conversion.path))
    _remove(path for path in cache_folder().glob(".*.partial") if _age(path) > DAY)
    return found


def _is_called(conversion: Conversion, name: str) -> bool:
    return Path(name).name in (conversion.path.name, conversion.path.stem)


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise GgufSdError(f"cannot remove {path}: {error.strerror}") from error


def _record(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _source(record: Path) -> str:
    try:
        source = read_json_object(record).get("source")
    except (OSError, GgufSdError):
        return ""
    return source if isinstance(source, str) else ""


def content_hash(model: Path, folder: Path, reading: Reading = _silent) -> str:
    """SHA-256 of a file's bytes, or of all weight and configuration files of a folder.

    Remembered in ``folder`` by path, size and time of change, so that a large checkpoint is not read every time.
    """
    files = sorted(_files(model))
    stats = [(str(f.relative_to(model.parent)), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    signature = json.dumps([str(model.resolve()), stats])
    memory = folder / HASHES
    known = _hashes(memory)
    if signature in known:
        return known[signature]
    digest = hashlib.sha256()
    with reading(sum(size for _, size, _ in stats)) as bar:
        for file, (name, size, _) in zip(files, stats, strict=True):
            digest.update(f"{name}\0{size}\0".encode())
            with open(file, "rb") as stream:
                while chunk := stream.read(CHUNK):
                    digest.update(chunk)
                    if bar is not None:
                        bar.update(len(chunk))
    _write_json(memory, {**known, signature: digest.hexdigest()})
    return digest.hexdigest()


def _files(model: Path) -> Iterator[Path]:
    if model.is_file():
        yield model
    else:
        yield from (f for f in model.rglob("*") if f.is_file() and f.suffix in WEIGHT_SUFFIXES)


def _hashes(memory: Path) -> dict[str, str]:
    try:
        values = read_json_object(memory)
    except (OSError, GgufSdError):  # none yet, or damaged: hashes are taken again
        return {}
    return {key: value for key, value in values.items() if isinstance(value, str)}


def _write_json(path: Path, value: Mapping[str, object]) -> None:
    with temporary_beside(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1))
        put_in_place(temporary, path)
