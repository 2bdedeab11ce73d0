"""Quantise-and-run in one command: models that are no GGUF are converted once, into the cache."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gguf_sd.cli.progress import progress_bar
from gguf_sd.errors import GgufSdError
from gguf_sd.imaging.atomic_write import cache_folder

DEFAULT_TYPE = "q8_0"
LAYOUT = "native"
CHUNK = 1 << 24  # bytes read at once
WEIGHT_SUFFIXES = {".safetensors", ".ckpt", ".json", ".txt", ".bin"}


def model_path(model: Path, kind: str | None, tokenizer: Path | None = None, quiet: bool = False) -> Path:
    """The GGUF file to run: ``model`` itself, or its conversion to ``kind``, made now if the cache lacks it."""
    if not model.exists():
        raise GgufSdError(f"{model} does not exist; give a .gguf file, a checkpoint or a diffusers folder")
    if model.suffix.lower() == ".gguf" or (model.is_file() and _magic(model) == b"GGUF"):
        if kind is not None:
            raise GgufSdError(f"{model} is a GGUF file already, --type is for checkpoints and diffusers folders")
        return model

    from gguf_sd_convert import convert as converter

    folder = cache_folder()
    options = converter.ConvertOptions(type=kind or DEFAULT_TYPE, layout=LAYOUT, tokenizer=tokenizer)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GgufSdError(f"cannot create the cache {folder}: {error.strerror}; set GGUF_SD_CACHE") from error
    digest = content_hash(model, folder, quiet)
    target = folder / f"{model.stem}-{digest[:16]}-{options.type}-{options.layout}.gguf"
    if not target.exists():
        converter.convert(model, target, options, quiet=quiet)
    return target


def _magic(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(4)
    except OSError as error:
        raise GgufSdError(f"cannot read {path}: {error.strerror}") from error


def content_hash(model: Path, folder: Path, quiet: bool = False) -> str:
    """SHA-256 of a checkpoint's bytes, or of all weight and configuration files of a diffusers folder.

    Remembered in ``folder`` by path, size and time of change, so that a large checkpoint is not read every time.
    """
    files = sorted(_files(model))
    stats = [(str(f.relative_to(model.parent)), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    signature = json.dumps([str(model.resolve()), stats])
    memory = folder / "hashes.json"
    known = _read_json(memory)
    if signature in known:
        return str(known[signature])
    digest = hashlib.sha256()
    total = sum(size for _, size, _ in stats)
    with progress_bar(total, quiet, unit="B", unit_scale=True, desc="reading") as bar:
        for file, (name, size, _) in zip(files, stats, strict=True):
            digest.update(f"{name}\0{size}\0".encode())
            with open(file, "rb") as stream:
                while chunk := stream.read(CHUNK):
                    digest.update(chunk)
                    bar.update(len(chunk))
    _write_json(memory, {**known, signature: digest.hexdigest()})
    return digest.hexdigest()


def _files(model: Path) -> Iterator[Path]:
    if model.is_file():
        yield model
    else:
        yield from (f for f in model.rglob("*") if f.is_file() and f.suffix in WEIGHT_SUFFIXES)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(value, indent=1))
    temporary.replace(path)
