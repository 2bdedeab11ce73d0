"""What lies in a safetensors file or a diffusers folder: tensors by part, told from headers alone, without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf_sd.checkpoint.safetensors_header import Stored, is_safetensors, read_table
from gguf_sd.checkpoint.what_is_it import CONTROLNET, Kind, what_is
from gguf_sd.errors import GgufSdError
from gguf_sd.json_text import read_json_object


@dataclass(frozen=True)
class Weights:
    """``parts``: tensors by their names in the file, by folder (diffusers) or under "" (a file)."""

    path: Path
    format: str
    size: int
    parts: dict[str, dict[str, Stored]]
    metadata: dict[str, Any] = field(default_factory=dict)
    pipeline: str = ""  # the class that a diffusers folder names

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: stored.shape for part in self.parts.values() for name, stored in part.items()}

    @property
    def kind(self) -> Kind | None:
        """What it is, where it is no model; of a folder with a model_index.json its class says that."""
        return None if len(self.parts) > 1 or "" not in self.parts else what_is(self.shapes)


def open_weights(path: Path) -> Weights:
    """``path``: a safetensors file, or a folder of diffusers or of one of its components. Raises GgufSdError."""
    if not path.exists():
        raise GgufSdError(f"{path} does not exist")
    if not path.is_dir():
        table = read_table(path)
        return Weights(path, "safetensors", table.size, {"": table.tensors}, table.metadata)
    index = path / "model_index.json"
    if not index.is_file():
        return _component(path)
    values = _json(index)
    parts, size = {}, 0
    for folder in sorted(name for name in values if not name.startswith("_")):
        if Path(folder).name == folder and (path / folder).is_dir() and (found := _files(path / folder)):
            tables = [read_table(file) for file in found]
            parts[folder] = {name: stored for table in tables for name, stored in table.tensors.items()}
            size += sum(table.size for table in tables)
    return Weights(path, "diffusers folder", size, parts, values, str(values.get("_class_name", "")))


def _component(path: Path) -> Weights:
    files = _files(path)
    if not files:
        raise GgufSdError(f"{path} is no diffusers folder: it has no model_index.json, and no safetensors files")
    tables = [read_table(file) for file in files]
    tensors = {name: stored for table in tables for name, stored in table.tensors.items()}
    config = _json(path / "config.json") if (path / "config.json").is_file() else {}
    return Weights(path, "folder of weights", sum(t.size for t in tables), {"": tensors}, config)


def _files(folder: Path) -> list[Path]:
    """The folder's weights: all its files of one precision, the usual one where there are several."""
    found = sorted(file for file in folder.glob("*.safetensors") if file.is_file())
    usual = [file for file in found if ".fp16" not in file.name and ".non_ema" not in file.name]
    return usual or found


def _json(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path)
    except OSError as error:
        raise GgufSdError(f"cannot read {path}: {error.strerror}") from error


def refuse_other_files(path: Path, unet: bool = False, control: bool = False) -> None:
    """Raises GgufSdError, which says what ``path`` is and what to do with it, for a safetensors file or a folder that
    is known to be no Stable Diffusion model, or not a whole one; ``unet``: a file of a UNet alone will do; ``control``:
    so will a ControlNet. It is found out from headers, before torch is imported and anything is read."""
    if path.is_dir() or is_safetensors(path):
        weights = open_weights(path)
        kind = weights.kind
        if (unet and kind and kind.part == "unet" and not path.is_dir()) or (control and kind is CONTROLNET):
            return
        if kind is not None:
            raise GgufSdError(f"{path} is {kind.name}; {kind.advice}")
