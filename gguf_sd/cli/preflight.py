"""What can be refused at once, from headers alone: before torch is imported, and before anything is read or written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from gguf_sd.checkpoint.gguf_header import is_gguf
from gguf_sd.checkpoint.safetensors_header import is_safetensors
from gguf_sd.checkpoint.weights import open_weights, refuse_other_files
from gguf_sd.checkpoint.what_is_it import CONTROLNET
from gguf_sd.errors import GgufSdError

if TYPE_CHECKING:
    from gguf_sd.checkpoint.part_files import PartPaths


def check_model(path: Path, parts: PartPaths | None = None) -> None:
    """Raises GgufSdError for what `generate` cannot paint with: no model, or one that lacks what ``parts`` do not
    give."""
    if not path.exists():
        raise GgufSdError(f"{path} does not exist; give a .gguf file, a checkpoint or a diffusers folder")
    if is_gguf(path) or path.suffix.lower() == ".gguf":
        from gguf_sd.checkpoint.model_file import ModelFile

        ModelFile.open(path, parts).check_whole(parts is not None and parts.vae is not None)
    else:
        refuse_other_files(path, unet=parts is not None and bool(parts.given))


def check_type(name: str | None) -> None:
    """Raises GgufSdError for the name of no type that the converter knows."""
    if name is not None:
        from gguf_sd_convert.quantize.policy import type_name

        type_name(name)


def check_source(path: Path, unet_only: bool = False) -> None:
    """Raises GgufSdError for what `convert` cannot take; ``unet_only``: a UNet alone will do."""
    if not path.exists():
        raise GgufSdError(f"{path} does not exist")
    if not is_gguf(path):
        refuse_other_files(path, unet=unet_only, control=True)


def check_control(path: Path) -> None:
    """Raises GgufSdError for what is known to be no ControlNet."""
    from gguf_sd.checkpoint.control_file import TAKES, ControlFile

    if not path.exists():
        raise GgufSdError(f"the ControlNet {path} does not exist; {TAKES}")
    if is_gguf(path) or path.suffix.lower() == ".gguf":
        ControlFile.open(path)
    elif path.is_dir() or is_safetensors(path):
        kind = open_weights(path).kind
        if kind is not CONTROLNET:
            what = kind.name if kind is not None else "no ControlNet"
            raise GgufSdError(f"{path} is {what}; {TAKES}")
