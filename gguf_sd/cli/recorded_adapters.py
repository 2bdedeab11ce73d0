"""The LoRAs and embeddings that a picture was painted with, found again for ``generate --from PICTURE``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from gguf_sd.adapters.lora import SUFFIX, TAG, as_loras, parse_weights, short_hash
from gguf_sd.errors import GgufSdError
from gguf_sd.imaging.png_metadata import read_hashes


def recorded_adapters(args: argparse.Namespace, recorded: dict[str, Any], model: Path) -> dict[str, Any]:
    """The settings of a picture that change: LoRAs that its prompt names become files, which are looked for in the
    current folder, beside the model and beside the picture, unless --lora gives one of that name or --lora-dir says
    where they are. Raises GgufSdError for one that is not there."""
    changed: dict[str, Any] = {}
    if args.settings is None:
        return changed
    folders = (Path(), model.parent, args.settings.parent)
    if args.prompt is None and args.lora_dir is None:
        changed |= _loras(args, recorded, folders)
    return changed


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
                f"{args.settings} was painted with the LoRA {name[:60]}, which is not here; give it with --lora, or "
                "its folder with --lora-dir"
            )
        found.append(parse_weights(path, match[2]))
    return {"prompt": TAG.sub("", prompt), "loras": found} if found or given else {}


def _find(folders: Iterable[Path], names: Iterable[str], wanted: str, hash_of: Callable[[Path], str]) -> Path | None:
    """The first file of one of these names, and with this beginning of its hash if there is one."""
    for path in (folder / Path(name).name for folder in folders for name in names):
        if path.is_file() and (not wanted or hash_of(path).startswith(wanted) or wanted.startswith(hash_of(path))):
            return path
    return None
