"""What the user points at -> canonical names, lazy tensors and a ModelConfig."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from gguf_sd.checkpoint.identify import identify
from gguf_sd.checkpoint.tensor_names import (
    OPENCLIP,
    OPENCLIP_LAYER,
    SAFETY,
    TEXT,
    UNET,
    VAE,
    XL_TEXT,
    canonical_names,
    inverted,
    rename,
    unet_modules,
    vae_modules,
)
from gguf_sd.config import SDXL_TURBO, ModelConfig
from gguf_sd.errors import GgufSdError
from gguf_sd_convert.sources.checkpoints import Checkpoint, Entry, open_checkpoint, open_safetensors, open_sharded
from gguf_sd_convert.sources.diffusers_config import read_model_config
from gguf_sd_convert.sources.inventory import Shape
from gguf_sd_convert.sources.safety_config import FOLDER as SAFETY_FOLDER

EMA = "model_ema."


@dataclass(frozen=True)
class Source:
    """A model that can be converted. ``tensors`` by canonical name; ``notes`` are sentences for the report."""

    path: Path
    config: ModelConfig
    tensors: dict[str, Entry]
    files: tuple[Path, ...]
    tokenizers: tuple[Path, ...]  # folders, one for each text encoder, of a diffusers source
    notes: tuple[str, ...]


def open_source(path: Path, ema: bool = False, config: ModelConfig | None = None) -> Source:
    """Opens a checkpoint file or a diffusers folder.

    ``ema`` takes a full checkpoint's averaged UNet; ``config`` is the model of a single file that is none of the
    recognised ones. Raises GgufSdError where the source is no Stable Diffusion, or not one that the engine runs.
    """
    if not path.exists():
        raise GgufSdError(f"{path} does not exist")
    if not path.is_dir():
        return _open_file(path, ema, config)
    if ema:
        raise GgufSdError(f"--ema is for single-file checkpoints; {path} is a folder, whose weights are what they are")
    return _open_folder(path)


def _open_file(path: Path, ema: bool, config: ModelConfig | None) -> Source:
    checkpoint = open_checkpoint(path)
    averaged = {name for name in checkpoint.entries if name.startswith(EMA)}
    names = canonical_names(name for name in checkpoint.entries if name not in averaged)
    notes = []
    if ema:
        names |= _ema_names(names, averaged, path)
        notes.append("took the EMA weights of the UNet")
    elif averaged:
        notes.append("the source holds EMA weights too; took the others (--ema takes them)")
    tensors = {canonical: checkpoint.entries[name] for canonical, name in names.items()}
    if config is None:
        shapes = {name: entry.shape for name, entry in tensors.items()}
        config, more = _single_file_config(identify(shapes, str(path)), checkpoint)
        notes += more
    return Source(path, config, tensors, checkpoint.files, (), tuple(notes))


def _ema_names(names: Mapping[str, str], averaged: set[str], path: Path) -> dict[str, str]:
    """Canonical names of the UNet -> names of its averaged tensors, which are written without dots."""
    found = {}
    for name in names:
        if name.startswith(UNET):
            written = EMA + name.removeprefix("model.").replace(".", "")
            if written in averaged:
                found[name] = written
            elif averaged:
                raise GgufSdError(f"{path} holds no EMA weights for {name}; convert it without --ema")
    if not found:
        raise GgufSdError(f"{path} holds no EMA weights; convert it without --ema")
    return found


def _single_file_config(config: ModelConfig, checkpoint: Checkpoint) -> tuple[ModelConfig, list[str]]:
    """What a single file says about itself beyond its shapes: its modelspec header, and the marker tensors that
    trainers leave in SDXL checkpoints."""
    notes = []
    architecture = checkpoint.metadata.get("modelspec.architecture", "")
    if config.name == "sdxl" and "turbo" in architecture:
        config = replace(config, scheduler=SDXL_TURBO.scheduler, defaults=SDXL_TURBO.defaults)
        notes.append(f"its header says {architecture}: sampled as SDXL-Turbo")
    if "v_pred" in checkpoint.entries or checkpoint.metadata.get("modelspec.prediction_type") == "v":
        config = replace(config, scheduler=replace(config.scheduler, prediction_type="v_prediction"))
        notes.append("the source says that it predicts v")
    return config, notes


def _open_folder(path: Path) -> Source:
    if not (path / "model_index.json").is_file():
        raise GgufSdError(f"{path} is no diffusers folder: it has no model_index.json")
    _check_pipeline(path)
    config, notes = read_model_config(path)
    parts = ["unet", "vae", "text_encoder", *(["text_encoder_2"] if config.name == "sdxl" else [])]
    parts += [SAFETY_FOLDER] if config.safety else []
    weights = {part: _weights(path / part) for part in parts}
    tensors = _renamed(weights["unet"], UNET, unet_modules(config.unet))
    tensors |= _renamed(weights["vae"], VAE, vae_modules(config.vae))
    tensors |= _clip(weights["text_encoder"], XL_TEXT[0] if config.name == "sdxl" else TEXT)
    if config.name == "sdxl":
        tensors |= _openclip(weights["text_encoder_2"], XL_TEXT[1])
    if config.safety:
        tensors |= _safety(weights[SAFETY_FOLDER])
    files = tuple(file for part in parts for file in weights[part].files)
    tokenizers = [path / "tokenizer", *([path / "tokenizer_2"] if config.name == "sdxl" else [])]
    present = tuple(folder for folder in tokenizers if folder.is_dir())
    return Source(path, config, tensors, files, present, tuple(notes))


def _check_pipeline(path: Path) -> None:
    try:
        kind = json.loads((path / "model_index.json").read_text(encoding="utf-8")).get("_class_name", "")
    except (OSError, ValueError, AttributeError) as error:
        raise GgufSdError(f"{path / 'model_index.json'} is no JSON object: {error}") from error
    if not str(kind).startswith(("StableDiffusionPipeline", "StableDiffusionInpaint", "StableDiffusionImg2Img",
                                 "StableDiffusionXL", "LatentConsistencyModel")):  # fmt: skip
        raise GgufSdError(
            f"{path} is a {kind}; gguf-sd takes StableDiffusionPipeline, StableDiffusionXLPipeline "
            "and their image-to-image and inpainting variants"
        )


def _weights(folder: Path) -> Checkpoint:
    """A component's weights: whole or sharded, in the usual precision or, failing that, the fp16 variant."""
    of_transformers = folder.name.startswith("text_encoder") or folder.name == SAFETY_FOLDER
    stem = "model" if of_transformers else "diffusion_pytorch_model"
    for name in (f"{stem}.safetensors", f"{stem}.fp16.safetensors"):
        if (path := folder / name).is_file():
            return open_safetensors(path)
    for name in (f"{stem}.safetensors.index.json", f"{stem}.safetensors.index.fp16.json"):
        if (path := folder / name).is_file():
            return open_sharded(path)
    raise GgufSdError(f"{folder} holds no {stem}.safetensors, neither whole nor sharded; gguf-sd takes no .bin there")


def _renamed(weights: Checkpoint, prefix: str, modules: Mapping[str, str]) -> dict[str, Entry]:
    result = {}
    for name, entry in weights.entries.items():
        new = rename(name, modules)
        if new is None:
            raise GgufSdError(f"{weights.files[0]} holds a tensor {name} that does not belong to its config.json")
        result[prefix + new] = entry
    return result


def _clip(weights: Checkpoint, prefix: str) -> dict[str, Entry]:
    """transformers 4 writes names with ``text_model.``, transformers 5 without."""
    return {
        f"{prefix}text_model.{name.removeprefix('text_model.')}": entry
        for name, entry in weights.entries.items()
        if not name.endswith("position_ids")
    }


def _safety(weights: Checkpoint) -> dict[str, Entry]:
    """transformers 4 writes the vision transformer's names with ``vision_model.`` twice, transformers 5 once."""
    vision = "vision_model."
    return {
        SAFETY + (name if name.startswith(vision * 2) else name.replace(vision, vision * 2, 1)): entry
        for name, entry in weights.entries.items()
        if not name.endswith("position_ids")
    }


def _openclip(weights: Checkpoint, prefix: str) -> dict[str, Entry]:
    """transformers' CLIPTextModelWithProjection under OpenCLIP's names: queries, keys and values in one tensor, the
    projection transposed."""
    entries = {name.removeprefix("text_model."): entry for name, entry in weights.entries.items()}
    tops, layers = inverted(OPENCLIP), inverted(OPENCLIP_LAYER)
    result = {}
    for name, entry in entries.items():
        if name in tops:
            result[prefix + tops[name]] = entry
        elif name == "text_projection.weight":
            result[prefix + "text_projection"] = _transposed(entry)
        elif name.startswith("encoder.layers."):
            _, _, index, rest = name.split(".", 3)
            module, _, leaf = rest.rpartition(".")
            block = f"{prefix}transformer.resblocks.{index}."
            if module in layers:
                result[f"{block}{layers[module]}.{leaf}"] = entry
            elif module == "self_attn.q_proj":
                names = [f"encoder.layers.{index}.self_attn.{x}_proj.{leaf}" for x in "qkv"]
                if missing := [n for n in names if n not in entries]:
                    raise GgufSdError(f"{weights.files[0]} holds no tensor {missing[0]}")
                result[f"{block}attn.in_proj_{leaf}"] = _stacked([entries[n] for n in names])
    return result


def _transposed(entry: Entry) -> Entry:
    return Entry(entry.shape[::-1], entry.dtype, lambda: entry.load().t().contiguous())


def _stacked(entries: list[Entry]) -> Entry:
    shape = (sum(entry.shape[0] for entry in entries), *entries[0].shape[1:])
    return Entry(shape, entries[0].dtype, lambda: torch.cat([entry.load() for entry in entries]))


def fitted(source: Source, expected: Mapping[str, Shape]) -> tuple[dict[str, Entry], list[str]]:
    """The tensors that the model takes, in the order of ``expected`` and with its shapes, and the names left over.

    1x1 convolutions may come as matrices and the other way round. Raises GgufSdError for what is missing, has
    another shape or is no floating-point tensor.
    """
    if missing := [name for name in expected if name not in source.tensors]:
        raise GgufSdError(
            f"{source.path} lacks {len(missing)} of {len(expected)} tensors, the first is {missing[0]}; "
            "a whole checkpoint or diffusers folder is needed: UNet, autoencoder and text encoder"
        )
    result = {}
    for name, shape in expected.items():
        entry = source.tensors[name]
        if _squeezed(entry.shape) != _squeezed(shape):
            raise GgufSdError(
                f"{source.path}: tensor {name} has shape {list(entry.shape)}, the model takes {list(shape)}"
            )
        if not entry.dtype.is_floating_point:
            raise GgufSdError(f"{source.path}: tensor {name} is {entry.dtype}; floating-point weights are needed")
        result[name] = replace(entry, shape=shape)
    return result, [name for name in source.tensors if name not in expected]


def _squeezed(shape: Shape) -> Shape:
    return shape[:2] if len(shape) == 4 and shape[2:] == (1, 1) else shape
