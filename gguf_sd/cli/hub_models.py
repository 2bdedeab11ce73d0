"""What a user names on the command line and lies on the Hugging Face Hub, fetched before it is looked at."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from gguf_sd.checkpoint.hub_names import hub_name
from gguf_sd.errors import GgufSdError

SAFETENSORS = ".safetensors"


def add_revision(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--revision", help="branch, tag or commit of a model on the Hugging Face Hub (main)")


def is_on_hub(*named: object) -> bool:
    """Whether one of these, paths or lists of them, is to be fetched. Raises GgufSdError for links to no model."""
    return any(_hub_part(str(item)) is not None for each in named for item in _items(each))


def local_model(model: Path, revision: str | None, quiet: bool = False) -> Path:
    """Where the model lies, fetched now where that is the Hub. Raises GgufSdError, also for a revision of what is here
    already."""
    if hub_name(model) is None:
        if revision is not None:
            raise GgufSdError(f"--revision is for a model of the Hugging Face Hub, {model} is none; leave it out")
        return model
    from gguf_sd.checkpoint.hub import fetched

    return fetched(model, revision, quiet)


def fetch_arguments(args: argparse.Namespace, names: Iterable[str]) -> None:
    """Puts local paths in place of what lies on the Hub, in these arguments, some of them lists; in a LoRA's
    file:weight, of the file."""
    for name in names:
        given = getattr(args, name)
        if isinstance(given, list):
            setattr(args, name, [_local(item, args.quiet) for item in given])
        elif given is not None:
            setattr(args, name, _local(given, args.quiet))


def _items(value: object) -> list[object]:
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]


def _hub_part(text: str) -> str | None:
    """What of the text names something on the Hub."""
    if hub_name(text) is None:
        return None
    head, dot, tail = text.rpartition(SAFETENSORS)
    return head + dot if dot and tail.startswith(":") else text


def _local(item: str | Path, quiet: bool) -> str | Path:
    text = str(item)
    if (part := _hub_part(text)) is None:
        return item
    local = local_model(Path(part), None, quiet)
    return local if isinstance(item, Path) else f"{local}{text[len(part) :]}"
