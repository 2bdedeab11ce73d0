"""`gguf-sd cache`, and quantise-and-run: models that are no GGUF are converted once, into the cache."""

from __future__ import annotations

import argparse
import json
import math
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf_sd.checkpoint import cache
from gguf_sd.checkpoint.cache import Conversion
from gguf_sd.errors import GgufSdError
from gguf_sd.input_files import open_input
from gguf_sd_kernels.cache_folder import cache_folder

if TYPE_CHECKING:
    from gguf_sd.config import ModelConfig

DEFAULT_TYPE = "q8_0"
LAYOUT = "native"


def add_parser(subparsers: Any) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "cache",
        help="list or clear the models that generate has converted",
        description="Lists the models that `gguf-sd generate` has converted and kept, or removes them. They lie in "
        "$GGUF_SD_CACHE, else gguf-sd under $XDG_CACHE_HOME, else ~/.cache/gguf-sd.",
    )
    add = parser.add_argument
    add("action", nargs="?", choices=("list", "clear"), default="list", help="what to do (list)")
    add("names", nargs="*", metavar="NAME", help="clear: the files to remove, as listed (all)")
    add("--older-than", type=float, metavar="DAYS", help="clear: only what was not used for so long")
    add("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.action == "list" and (args.names or args.older_than is not None):
        raise GgufSdError("NAME and --older-than are for `gguf-sd cache clear`")
    if args.older_than is not None and not 0 <= args.older_than < math.inf:
        raise GgufSdError(f"--older-than is {args.older_than:g}; it takes a number of days")
    found = cache.conversions() if args.action == "list" else cache.clear(args.names, args.older_than)
    print(json.dumps(_facts(found), indent=2) if args.json else _table(found, args.action))
    return 0


def _facts(found: list[Conversion]) -> dict[str, Any]:
    rows = [{"file": c.path.name, "source": c.source, "bytes": c.nbytes, "used": _date(c, "seconds")} for c in found]
    return {"folder": str(cache_folder()), "files": rows, "bytes": sum(c.nbytes for c in found)}


def _date(conversion: Conversion, precision: str) -> str:
    return datetime.fromtimestamp(conversion.used).astimezone().isoformat(" ", precision)


def _table(found: list[Conversion], action: str) -> str:
    lines = [
        f"{c.nbytes / 1e6:>10,.1f} MB  {_date(c, 'minutes')[:16]}  {c.path.name}  from {c.source or '?'}" for c in found
    ]
    what = "removed from" if action == "clear" else "in"
    return "\n".join([*lines, f"{sum(c.nbytes for c in found) / 1e6:>10,.1f} MB {what} {cache_folder()}"])


def is_gguf(model: Path) -> bool:
    """Whether a model can be run as it is. Raises GgufSdError for one that does not exist or cannot be read."""
    if not model.exists():
        raise GgufSdError(f"{model} does not exist; give a .gguf file, a checkpoint or a diffusers folder")
    return model.suffix.lower() == ".gguf" or (model.is_file() and _magic(model) == b"GGUF")


def model_path(
    model: Path, kind: str | None, tokenizer: Path | None = None, quiet: bool = False, **options: Any
) -> Path:
    """The GGUF file to run: ``model`` itself, or its conversion to ``kind``, made now if the cache lacks it.
    ``options`` are further ones of ConvertOptions: ema, preset, safety."""
    if is_gguf(model):
        if kind is not None:
            raise GgufSdError(f"{model} is a GGUF file already, --type is for checkpoints and diffusers folders")
        return model
    settings = _settings(kind, options)
    inputs = () if tokenizer is None else (_found(tokenizer),)
    target = cache.conversion_path(model, settings, inputs, lambda total: _reading(total, quiet))
    if not cache.is_whole(target):
        from gguf_sd_convert.convert import ConvertOptions, convert

        convert(model, target, ConvertOptions(**settings, tokenizer=tokenizer, force=True, shared=True), quiet=quiet)
        cache.keep(target, model)
    return target


def _reading(total: int, quiet: bool) -> Any:
    from gguf_sd.cli.progress import progress_bar

    return progress_bar(total, quiet, unit="B", unit_scale=True, desc="reading")


def model_config(model: Path, kind: str | None = None, **options: Any) -> ModelConfig:
    """The configuration of a model, from headers alone: what a request can be checked against before minutes of
    converting. Token ids of one that is still to be converted are not its tokenizer's yet."""
    if is_gguf(model):
        from gguf_sd.checkpoint.model_file import ModelFile

        return ModelFile.open(model).config
    from gguf_sd_convert.options import ConvertOptions
    from gguf_sd_convert.prepare import source_config

    return source_config(model, ConvertOptions(**_settings(kind, options)))


def _settings(kind: str | None, options: dict[str, Any]) -> dict[str, Any]:
    from gguf_sd_convert.quantize.policy import type_name

    return {"ema": False, "preset": None, "safety": True, **options, "type": type_name(kind or DEFAULT_TYPE),
            "layout": LAYOUT}  # fmt: skip


def _found(tokenizer: Path) -> Path:
    if not tokenizer.exists():
        raise GgufSdError(f"--tokenizer {tokenizer} does not exist")
    return tokenizer


def _magic(path: Path) -> bytes:
    try:
        with open_input(path) as file:
            return file.read(4)
    except OSError as error:
        raise GgufSdError(f"cannot read {path}: {error.strerror}") from error
