"""A ControlNet that the user points at -> canonical names, lazy tensors and a ControlConfig."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from gguf_sd.checkpoint.control_file import control_names, identify_control
from gguf_sd.checkpoint.tensor_names import CONTROL, control_modules, rename
from gguf_sd.checkpoint.what_is_it import CONTROLNET, what_is
from gguf_sd.config import SD15, SDXL, ControlConfig
from gguf_sd.errors import GgufSdError
from gguf_sd_convert.sources.checkpoints import Checkpoint, Entry, open_checkpoint
from gguf_sd_convert.sources.diffusers_config import control_config
from gguf_sd_convert.sources.json_settings import read_json
from gguf_sd_convert.sources.source import DIFFUSERS_STEM, component_weights

OF_DIFFUSERS = "controlnet_cond_embedding.conv_in.weight"
CONFIG = "config.json"


def control_checkpoint(path: Path) -> tuple[Checkpoint, Path | None] | None:
    """The tensors of a ControlNet, and the configuration that lies with them; None where ``path`` is something else.
    Raises GgufSdError for what cannot be read."""
    if path.is_dir():
        if not (path / CONFIG).is_file() or (path / "model_index.json").exists():
            return None
        if read_json(path / CONFIG).get("_class_name") != "ControlNetModel":
            return None
        return component_weights(path, DIFFUSERS_STEM), path / CONFIG
    checkpoint = open_checkpoint(path)
    if what_is({name: entry.shape for name, entry in checkpoint.entries.items()}) is not CONTROLNET:
        return None
    beside = path.with_name(CONFIG) if path.name.startswith(DIFFUSERS_STEM) else None
    return checkpoint, beside if beside is not None and beside.is_file() else None


def control_source(checkpoint: Checkpoint, settings: Path | None, path: Path) -> tuple[ControlConfig, dict[str, Entry]]:
    """Configuration and entries by canonical name. Raises GgufSdError where it is none that the engine runs."""
    entries = checkpoint.entries
    if OF_DIFFUSERS not in entries:
        names = control_names(entries)
        tensors = {canonical: entries[name] for canonical, name in names.items()}
        return identify_control({name: entry.shape for name, entry in tensors.items()}, str(path)), tensors
    config = control_config(settings) if settings is not None else _by_shape(entries, path)
    modules = control_modules(config)
    return config, {CONTROL + (rename(name, modules) or name): entry for name, entry in entries.items()}


def _by_shape(entries: Mapping[str, Entry], path: Path) -> ControlConfig:
    """Of a file with diffusers' names and no configuration beside it."""
    vector = entries.get("add_embedding.linear_1.weight")
    model = SD15 if vector is None else SDXL
    config = ControlConfig(model.name, model.unet)
    first = entries.get("conv_in.weight")
    if first is None or first.shape[0] != model.unet.block_out_channels[0]:
        raise GgufSdError(
            f"{path} is a ControlNet of an unknown shape; put diffusers' {CONFIG} into a folder with it, as "
            f"{DIFFUSERS_STEM}.safetensors, and give the folder"
        )
    return config
