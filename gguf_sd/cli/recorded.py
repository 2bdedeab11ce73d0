"""`generate --from PICTURE`: the settings that a picture carries, under those of the command line."""

from __future__ import annotations

import argparse
import hashlib
import logging
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf_sd.errors import GgufSdError
from gguf_sd.field_checks import called
from gguf_sd.input_files import is_there, open_input

if TYPE_CHECKING:
    from gguf_sd.request import Request

log = logging.getLogger(__name__)


def make_request(args: argparse.Namespace, recorded: dict[str, Any]) -> Request:
    """The settings of the command line over those recorded in a picture, checked as far as no model is needed for.

    A sampler that is given takes the recorded schedule with it. Raises GgufSdError for wrong values, and where the
    picture was painted from others that are not given.
    """
    from gguf_sd.imaging.images import open_image
    from gguf_sd.request import Request, checked

    names = {field.name for field in fields(Request)}
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    values = {name: value for name, value in recorded.items() if name in names}
    if "sampler" in given:
        values.pop("schedule", None)
    given |= {name: [*values.get(name, ()), *given[name]] for name in ("loras", "embeddings") if name in given}
    values |= given
    _check_recorded(args, recorded, values)
    values |= {name: open_image(values[name]) for name in ("image", "mask") if name in values}
    return checked(Request(**values))


def _check_recorded(args: argparse.Namespace, recorded: dict[str, Any], values: dict[str, Any]) -> None:
    if recorded.get("hires"):
        log.warning(
            "%s was painted in two passes; the first is repeated, its second (hires) pass is not", args.settings
        )
    if "strength" in recorded and args.image is None:
        raise GgufSdError(f"{args.settings} was painted from another picture; give that one with --init-image")
    if recorded.get("masked") and args.mask is None:
        raise GgufSdError(f"{args.settings} was painted with a mask; give that one with --mask")
    if args.sampler is None and "sampler" in recorded:
        _check_names(args, values)


def _check_names(args: argparse.Namespace, values: dict[str, Any]) -> None:
    """Names from a picture that nobody here knows are blamed on it."""
    from gguf_sd.sampling import resolve_sampler, resolve_schedule

    flag = "--sampler"
    try:
        sampler, _ = resolve_sampler(values["sampler"])
        flag = "--schedule"
        if args.schedule is None and values.get("schedule") is not None:
            resolve_schedule(values["schedule"], sampler)
    except GgufSdError as error:
        raise GgufSdError(f"{args.settings}, or choose one with {flag}: {error}") from error


def recorded_vae(args: argparse.Namespace, recorded: dict[str, Any], model: Path) -> Path | None:
    """The autoencoder to take: the one asked for, else that of the picture, where a file of its name (and with its
    contents, if the picture says) lies in the current folder, beside the model or beside the picture."""
    if args.vae is not None or "vae" not in recorded:
        return Path(args.vae) if args.vae is not None else None
    name = Path(recorded["vae"]).name  # a stranger's picture names files, not places
    for folder in (Path(), model.parent, args.settings.parent):
        path = folder / name
        if name and is_there(path) and vae_hash(path).startswith(recorded.get("vae_hash", "")):
            return path
    log.warning("%s was painted with the VAE %s, which is not here; give it with --vae", args.settings, called(name))
    return None


def vae_hash(path: Path | None) -> str:
    """SHA-256 of a VAE's file; of folders and GGUF models, which hold more than that, it is empty."""
    return "" if path is None or not path.is_file() or path.suffix.lower() == ".gguf" else file_hash(path)


def file_hash(path: Path) -> str:
    """SHA-256 of a file. Raises GgufSdError where it cannot be read."""
    try:
        with open_input(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise GgufSdError(f"cannot read {path}: {error.strerror}") from error


def warn_of_other_model(recorded: dict[str, Any], source_hash: str) -> None:
    wanted = recorded.get("model_hash", "")
    if wanted and source_hash and not source_hash.startswith(wanted):
        log.warning(
            "the picture was painted by another model (%s, hash %s), the result will differ",
            recorded.get("model"),
            wanted,
        )
