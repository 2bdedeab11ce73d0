"""What is converted of a ControlNet: its tensors and what the file says of them, for :mod:`gguf_sd_convert.convert`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf

from gguf_sd.checkpoint import inventory
from gguf_sd.checkpoint import metadata_keys as keys
from gguf_sd.checkpoint.gguf_header import is_gguf
from gguf_sd.checkpoint.hub_names import plain_name
from gguf_sd.checkpoint.tensor_names import CONTROL
from gguf_sd.config import ControlConfig
from gguf_sd.errors import GgufSdError
from gguf_sd_convert.base_model import base_model_keys
from gguf_sd_convert.quantize.policy import Stored
from gguf_sd_convert.sources.control_source import control_checkpoint, control_source
from gguf_sd_convert.sources.entries import Entry
from gguf_sd_convert.sources.source import fit_tensors

if TYPE_CHECKING:
    from gguf_sd_convert.options import ConvertOptions

LAYOUT = "native"
OF_MODELS = ("ema", "config", "preset", "tokenizer", "loras")  # options that a ControlNet has no use for


@dataclass(frozen=True)
class ControlJob:
    """A ControlNet that can be converted: tensors by canonical name, in their order, and the names left over."""

    path: Path
    config: ControlConfig
    tensors: dict[str, Entry]
    unused: list[str]
    files: tuple[Path, ...]

    def metadata(self, kind: str, source_hash: str, stored: list[Stored]) -> dict[str, Any]:
        """What the file says of itself; ``kind`` is the type."""
        name = plain_name(self.path)
        return {
            keys.NAME: name if self.path.is_dir() else Path(name).stem,
            keys.FILE_TYPE: int(gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"]),
            keys.QUANTIZATION_VERSION: gguf.GGML_QUANT_VERSION,
            keys.FORMAT: keys.FORMAT_VERSION,
            keys.LAYOUT: LAYOUT,
            keys.TYPE: kind,
            keys.CONTROL: json.dumps(asdict(self.config)),
            keys.SOURCE_NAME: name,
            keys.SOURCE_HASH: source_hash,
            keys.SHAPES: json.dumps({tensor.name: list(tensor.logical) for tensor in stored if tensor.reshaped}),
        } | base_model_keys(self.path)


def control_job(path: Path, options: ConvertOptions) -> ControlJob | None:
    """The ControlNet at ``path``; None where that is something else. Raises GgufSdError for one that the engine does
    not run, and for options that it has no use for."""
    if not path.exists() or is_gguf(path):
        return None
    found = control_checkpoint(path)
    if found is None:
        return None
    if given := [name for name in OF_MODELS if getattr(options, name)]:
        raise GgufSdError(f"{path} is a ControlNet, which --{given[0].removesuffix('s')} is not for; leave it out")
    if options.layout not in (LAYOUT, "auto"):
        raise GgufSdError(f"{path} is a ControlNet, which no other program reads from a GGUF file; leave --layout out")
    checkpoint, settings = found
    config, entries = control_source(checkpoint, settings, path)
    expected = ((CONTROL + name, shape) for name, shape in inventory.controlnet(config))
    tensors, unused = fit_tensors(entries, expected, path, "a whole ControlNet is needed")
    return ControlJob(path, config, tensors, unused, checkpoint.files)
