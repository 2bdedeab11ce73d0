"""Which textual-inversion embeddings are asked for, and the words that stand for them in prompts."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from gguf_sd.checkpoint.safetensors_header import is_safetensors, read_table
from gguf_sd.errors import GgufSdError
from gguf_sd.field_checks import shown

SUFFIXES = (".safetensors", ".pt", ".bin")
MAX_BYTES = 64 << 20
MAX_NAME = 100
MAX_EMBEDDINGS = 100
SHORT_HASH = 12  # characters that AUTOMATIC1111 records
NO_NAME = re.compile(r"[()\[\]\\\n\r]|^\s|\s$|^$|^BREAK$")  # what a prompt reads as something else


@dataclass(frozen=True)
class EmbeddingFile:
    """``name`` stands for it in prompts; None: the file's name, and that in it, if it has one."""

    path: Path
    name: str | None = None

    @property
    def main_name(self) -> str:
        return self.path.stem if self.name is None else self.name


def as_embeddings(value: Any) -> tuple[EmbeddingFile, ...]:
    """What a caller gives: one, or a list of, path, ``name=file``, (name, path) and EmbeddingFile. Raises TypeError for
    anything else."""
    pair = isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str) and not _is_file(value[0])
    if pair or isinstance(value, EmbeddingFile | str | os.PathLike):
        value = [value]
    return tuple(_as_embedding(item) for item in value)


def _is_file(text: str) -> bool:
    return "=" in text or text.endswith(SUFFIXES)


def _as_embedding(item: Any) -> EmbeddingFile:
    if isinstance(item, EmbeddingFile):
        return item
    if isinstance(item, str):
        name, equals, path = item.partition("=")
        named = equals and path and os.sep not in name and not Path(item).exists()
        return EmbeddingFile(Path(path), name) if named else EmbeddingFile(Path(item))
    if isinstance(item, os.PathLike):
        return EmbeddingFile(Path(item))
    name, path = item
    if not isinstance(name, str) or not isinstance(path, str | os.PathLike):
        raise TypeError
    return EmbeddingFile(Path(path), name)


def check_embedding_files(files: Iterable[EmbeddingFile]) -> None:
    """Raises GgufSdError for what shows without a model: names that cannot be, names twice, files that are none."""
    seen: dict[str, EmbeddingFile] = {}
    for file in files:
        name = file.main_name
        if NO_NAME.search(name) or len(name) > MAX_NAME:
            raise GgufSdError(
                f"the embedding {file.path} cannot be called {shown(name)} in a prompt; give it another name, NAME=FILE"
            )
        if other := seen.get(name.lower()):
            raise GgufSdError(f"two embeddings are called {shown(name)}, {other.path} and {file.path}; rename one")
        seen[name.lower()] = file
        _check_file(file.path)
    if len(seen) > MAX_EMBEDDINGS:
        raise GgufSdError(f"{len(seen)} embeddings are given; at most {MAX_EMBEDDINGS} are taken")


def _check_file(path: Path) -> None:
    if not path.is_file():
        what = "is a folder" if path.exists() else "does not exist"
        raise GgufSdError(f"the embedding {path} {what}; give a .safetensors, .pt or .bin file")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise GgufSdError(f"{path} is no embedding: it has {size / 1e6:.0f} MB, an embedding some kilobytes")
    if is_safetensors(path):
        read_table(path)


def short_hash(path: Path) -> str:
    """The start of a file's SHA-256, by which AUTOMATIC1111 and Civitai name an embedding."""
    stat = path.stat()
    return _short_hash(path, (stat.st_mtime_ns, stat.st_size))


@lru_cache(maxsize=MAX_EMBEDDINGS)
def _short_hash(path: Path, stamp: tuple[int, int]) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:SHORT_HASH]
