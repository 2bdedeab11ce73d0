"""The LoRAs and embeddings that a picture was painted with, found again for ``generate --from PICTURE``."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from gguf_sd.adapters.embedding_files import SUFFIXES, EmbeddingFile, as_embeddings
from gguf_sd.adapters.embedding_files import short_hash as embedding_hash
from gguf_sd.adapters.lora import SUFFIX, TAG, as_loras, parse_weights, short_hash
from gguf_sd.errors import GgufSdError
from gguf_sd.field_checks import called, shown
from gguf_sd.imaging.png_metadata import read_hashes
from gguf_sd.input_files import is_there

log = logging.getLogger(__name__)


def recorded_adapters(args: argparse.Namespace, recorded: dict[str, Any], model: Path) -> dict[str, Any]:
    """The settings of a picture that change: LoRAs that its prompt names become files, which are looked for in the
    current folder, beside the model and beside the picture, unless --lora gives one of that name or --lora-dir says
    where they are; and embeddings that it used. Raises GgufSdError for a LoRA that is not there."""
    changed: dict[str, Any] = {}
    if args.settings is None:
        return changed
    folders = (Path(), model.parent, args.settings.parent)
    if args.prompt is None and args.lora_dir is None:
        changed |= _loras(args, recorded, folders)
    changed["embeddings"] = _embeddings(args, recorded, folders)
    return changed


def _embeddings(args: argparse.Namespace, recorded: dict[str, Any], folders: Iterable[Path]) -> list[EmbeddingFile]:
    """Those that are here. One that is not is a word like any other, as in the program that wrote the picture."""
    given = {file.main_name for file in as_embeddings(args.embeddings or ())}
    found = []
    for name, wanted in read_hashes(recorded.get("embedding_hashes", "")).items():
        if name in given:
            continue
        path = _find(folders, [name + suffix for suffix in SUFFIXES], wanted, embedding_hash)
        if path is None:
            log.warning(
                "%s was painted with the embedding %s, which is not here; give it with --embedding",
                args.settings,
                called(name),
            )
        else:
            found.append(EmbeddingFile(path, name))
    return found


def _loras(args: argparse.Namespace, recorded: dict[str, Any], folders: Iterable[Path]) -> dict[str, Any]:
    prompt, hashes = recorded.get("prompt", ""), read_hashes(recorded.get("lora_hashes", ""))
    given = {lora.name for lora in as_loras(args.loras or ())}
    found = []
    for match in TAG.finditer(prompt):
        name = match[1].strip()
        if name in given:
            continue
        path = _find(folders, [name + SUFFIX], hashes.get(name, ""), short_hash)
        if path is None:
            raise GgufSdError(
                f"{args.settings} was painted with the LoRA {shown(name)}, which is not here; give it with --lora, or "
                "its folder with --lora-dir"
            )
        found.append(parse_weights(path, match[2]))
    return {"prompt": TAG.sub("", prompt).rstrip(" "), "loras": found} if found or given else {}


def _find(folders: Iterable[Path], names: Iterable[str], wanted: str, hash_of: Callable[[Path], str]) -> Path | None:
    """The first file of one of these names, and with this beginning of its hash if there is one."""
    for path in (folder / Path(name).name for folder in folders for name in names):
        if (
            is_there(path)
            and path.is_file()
            and (not wanted or hash_of(path).startswith(wanted) or wanted.startswith(hash_of(path)))
        ):
            return path
    return None
