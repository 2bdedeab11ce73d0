"""`generate --control …`: ControlNets with their pictures, given or recorded in a picture, made ready to run."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf_sd.cli.preflight import check_control
from gguf_sd.errors import GgufSdError
from gguf_sd.field_checks import called
from gguf_sd.input_files import is_there

if TYPE_CHECKING:
    from gguf_sd.control import Control

SUFFIXES = (".gguf", ".safetensors", ".pth", ".ckpt", "")  # of a recorded name; the last is a folder


def add_control_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--control", action="append", dest="control_models", type=Path, metavar="MODEL", help="a ControlNet: a .gguf "
        "file, or a checkpoint or diffusers folder, converted into the cache first; may be given several "
        "times")  # fmt: skip
    add("--control-image", action="append", dest="control_images", type=Path, metavar="PICTURE", help="what it sees, "
        "edges, depths or a pose as it was trained on; one for each --control")  # fmt: skip
    numbers = {"scale": "how much of what it says is added (1)", "start": "from which share of the steps on (0)",
               "end": "up to which share of the steps (1)"}  # fmt: skip
    for name, text in numbers.items():
        add(f"--control-{name}", action="append", dest=f"control_{name}s", type=float, metavar=name.upper(),
            help=f"{text}; one for all, or one for each --control")  # fmt: skip
    parser.set_defaults(controls=None)


def given_controls(args: argparse.Namespace, recorded: Sequence[dict[str, Any]], model: Path) -> list[Control] | None:
    """What the command line asks for, over what a picture recorded; None for nothing. Files are looked at, headers
    alone. Raises GgufSdError for what does not go together, and for what is not here."""
    from gguf_sd.control import Control

    models, pictures = args.control_models or [], args.control_images or []
    again = [] if models else list(recorded)
    if again:
        folders = (Path(), model.parent, args.settings.parent)
        models = [_found_again(one, folders, args.settings) for one in again]
        names = [one["image"] for one in again]
        pictures = pictures or [_picture_again(name, folders, args.settings) for name in names]
    if len(models) != len(pictures):
        raise GgufSdError(
            f"{len(models)} ControlNets are given and {len(pictures)} pictures for them; give one --control-image for "
            "each --control"
        )
    for path in models:
        check_control(path)
    columns = [_column(args, name, [one[name] for one in again], len(models)) for name in ("scale", "start", "end")]
    found = [Control(*values) for values in zip(models, pictures, *columns, strict=True)]
    return found or None


def _column(args: argparse.Namespace, name: str, recorded: Sequence[float], count: int) -> list[float]:
    """A number for each ControlNet."""
    given: list[float] = getattr(args, f"control_{name}s") or []
    if given and not count:
        raise GgufSdError(f"--control-{name} is for a ControlNet; give one with --control")
    if len(given) == 1:
        given *= count
    if not given:
        return list(recorded) or [0.0 if name == "start" else 1.0] * count
    if len(given) != count:
        raise GgufSdError(
            f"--control-{name} is given {len(given)} times for {count} ControlNets; give one, or one each"
        )
    return given


def _found_again(one: dict[str, Any], folders: Iterable[Path], settings: Path) -> Path:
    name, wanted = Path(one["model"]).name, one["hash"]
    for path in (folder / f"{name}{suffix}" for folder in folders for suffix in SUFFIXES):
        if name and is_there(path) and (path.is_dir() or not wanted or _hash(path).startswith(wanted)):
            return path
    what = f"the ControlNet {called(name)}, which is not here"
    raise GgufSdError(f"{settings} was painted with {what}; give it with --control")


def _hash(path: Path) -> str:
    from gguf_sd.checkpoint.control_file import ControlFile
    from gguf_sd.cli.recorded import file_hash

    return ControlFile.open(path).source_hash if path.suffix == ".gguf" else file_hash(path)


def _picture_again(name: str, folders: Iterable[Path], settings: Path) -> Path:
    for path in (folder / Path(name).name for folder in folders):
        if name and is_there(path) and path.is_file():
            return path
    what = f"the picture {called(Path(name).name)}, which is not here" if name else "a picture that it does not name"
    raise GgufSdError(f"{settings} was painted with a ControlNet and {what}; give it with --control-image")


def ready_controls(controls: Sequence[Control], kind: Any, quiet: bool) -> list[Control]:
    """The same with GGUF files: conversions of what is none to ``kind``, the model's own if the converter has it, made
    now if the cache lacks them."""
    from dataclasses import replace

    from gguf_sd.cli.cache import is_gguf, model_path
    from gguf_sd_convert.quantize.policy import TYPES

    kind = kind if kind in TYPES else None
    ready = []
    for control in controls:
        path = Path(control.path)
        ready.append(replace(control, path=path if is_gguf(path) else model_path(path, kind, quiet=quiet)))
    return ready
