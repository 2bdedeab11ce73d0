"""What the user points at -> canonical names, lazy tensors and a ModelConfig."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from gguf_sd.checkpoint.check_tensors import squeezed
from gguf_sd.checkpoint.gguf_header import is_gguf
from gguf_sd.checkpoint.identify import MARKERS, identify, marked
from gguf_sd.checkpoint.inventory import Tensors
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
from gguf_sd.field_checks import shown
from gguf_sd_convert.sources.checkpoints import Checkpoint, Entry, open_checkpoint, open_safetensors, open_sharded
from gguf_sd_convert.sources.diffusers_config import read_model_config
from gguf_sd_convert.sources.gguf_source import (
    gguf_entries,
    gguf_model,
    second_text_encoder,
    without_second_text_encoder,
)
from gguf_sd_convert.sources.json_settings import read_json
from gguf_sd_convert.sources.safety_config import FOLDER as SAFETY_FOLDER

EMA = "model_ema."
DIFFUSERS_STEM = "diffusion_pytorch_model"
PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionInpaint",
    "StableDiffusionImg2Img",
    "StableDiffusionXL",
    "LatentConsistencyModel",
)
# What modelspec.prediction_type may say, and diffusers' word for it.
PREDICTS = {"epsilon": "epsilon", "eps": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}


@dataclass(frozen=True)
class Source:
    """A model that can be converted. ``tensors`` by canonical name; ``notes`` are sentences for the report."""

    path: Path
    config: ModelConfig
    tensors: dict[str, Entry]
    files: tuple[Path, ...]
    tokenizers: tuple[Path, ...]  # folders, one for each text encoder, of a diffusers source
    notes: tuple[str, ...]
    metadata: Mapping[str, Any] | None = None  # of a GGUF source, where others have none

    @property
    def said(self) -> Mapping[str, Any]:
        """The metadata of a GGUF source, which may be empty as well."""
        return self.metadata or {}


def open_source(path: Path, ema: bool = False, config: ModelConfig | None = None, safety: bool = True) -> Source:
    """Opens a checkpoint file or a diffusers folder.

    ``ema`` takes a full checkpoint's averaged UNet; ``config`` is the model of a single file that is none of the
    recognised ones; ``safety`` takes a folder's safety checker. Raises GgufSdError where the source is no Stable
    Diffusion, or not one that the engine runs.
    """
    if not path.exists():
        raise GgufSdError(f"{path} does not exist")
    if not path.is_dir() and is_gguf(path):
        if ema:
            raise GgufSdError(f"--ema is for checkpoints; {path} is a GGUF file, whose weights are what they are")
        return _open_gguf(path, config, safety)
    if not path.is_dir():
        return _open_file(path, ema, config)
    if ema:
        raise GgufSdError(f"--ema is for single-file checkpoints; {path} is a folder, whose weights are what they are")
    return _open_folder(path, safety)


def _open_file(path: Path, ema: bool, config: ModelConfig | None) -> Source:
    checkpoint = open_checkpoint(path)
    averaged = {name for name in checkpoint.entries if name.startswith(EMA)}
    unet = config.unet if config else None
    names = canonical_names((name for name in checkpoint.entries if name not in averaged), unet)
    notes = []
    if ema:
        names |= _ema_names(names, averaged, path)
        notes.append("took the EMA weights of the UNet")
    elif averaged:
        notes.append("the source holds EMA weights too; took the others (--ema takes them)")
    tensors = {canonical: checkpoint.entries[name] for canonical, name in names.items()}
    if config is None:
        shapes = {name: entry.shape for name, entry in tensors.items()}
        config = identify(shapes, str(path))
    config, more = _said_of_itself(config, checkpoint, path)
    tensors = {name: entry for name, entry in tensors.items() if name not in MARKERS}
    return Source(path, config, tensors, checkpoint.files, (), (*notes, *more))


def _open_gguf(path: Path, config: ModelConfig | None, safety: bool) -> Source:
    """A GGUF file of ours or of another tool, whole or a UNet alone."""
    model = gguf_model(path, config)
    entries = gguf_entries(model)
    if second := second_text_encoder(model, entries):
        entries = without_second_text_encoder(entries) | _openclip(Checkpoint(second, (path,)), XL_TEXT[1])
    config = model.config if safety else replace(model.config, safety=None)
    if not safety:
        entries = {name: entry for name, entry in entries.items() if not name.startswith(SAFETY)}
    return Source(path, config, entries, (path,), (), (), model.file.metadata)


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


def _said_of_itself(config: ModelConfig, checkpoint: Checkpoint, path: Path) -> tuple[ModelConfig, list[str]]:
    """What a single file says about itself beyond its shapes: in its header (modelspec,
    https://github.com/Stability-AI/ModelSpec, and kohya's ss_ keys), and by the marker tensors of trainers."""
    notes, header = [], checkpoint.metadata
    architecture = header.get("modelspec.architecture", "")
    if config.name == "sdxl" and "turbo" in architecture:
        config = replace(config, scheduler=SDXL_TURBO.scheduler, defaults=SDXL_TURBO.defaults)
        notes.append(f"its header says {architecture}: sampled as SDXL-Turbo")
    markers = {name for name in MARKERS if name in checkpoint.entries or _says_yes(header.get(name))}
    markers |= {"ztsnr"} if _says_yes(header.get("ss_zero_terminal_snr")) else set()
    predicts = header.get("modelspec.prediction_type", "epsilon")
    if predicts not in PREDICTS:
        raise GgufSdError(
            f"{path}: modelspec.prediction_type in its header is {shown(predicts)}; gguf-sd takes {', '.join(PREDICTS)}"
        )
    markers |= {"v_pred"} if PREDICTS[predicts] == "v_prediction" else set()
    if "v_pred" in markers:
        notes.append("the source says that it predicts v")
    return marked(config, markers, str(path)), notes


def _says_yes(value: str | None) -> bool:
    return value is not None and value.strip().lower() not in ("", "false", "0", "no", "none")


def _open_folder(path: Path, safety: bool) -> Source:
    if not (path / "model_index.json").is_file():
        raise GgufSdError(f"{path} is no diffusers folder: it has no model_index.json")
    _check_pipeline(path)
    config, notes = read_model_config(path, safety)
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
    kind = read_json(path / "model_index.json").get("_class_name", "")
    if not isinstance(kind, str) or not kind.startswith(PIPELINES):
        raise GgufSdError(
            f"{path} is a {shown(kind)}; gguf-sd takes StableDiffusionPipeline, StableDiffusionXLPipeline "
            "and their image-to-image and inpainting variants"
        )


def _weights(folder: Path) -> Checkpoint:
    of_transformers = folder.name.startswith("text_encoder") or folder.name == SAFETY_FOLDER
    return component_weights(folder, "model" if of_transformers else DIFFUSERS_STEM)


def component_weights(folder: Path, stem: str) -> Checkpoint:
    """A component's weights: whole or sharded, in the usual precision or, failing that, the fp16 variant."""
    for name in (f"{stem}.safetensors", f"{stem}.fp16.safetensors"):
        if (path := folder / name).is_file():
            return open_safetensors(path)
    for name in (f"{stem}.safetensors.index.json", f"{stem}.safetensors.index.fp16.json"):
        if (path := folder / name).is_file():
            return open_sharded(path)
    raise GgufSdError(f"{folder} holds no {stem}.safetensors, neither whole nor sharded; gguf-sd takes no .bin there")


def _renamed(weights: Checkpoint, prefix: str, modules: Mapping[str, str]) -> dict[str, Entry]:
    """Names that fit no module stay as they are, to be named as what does not belong."""
    return {prefix + (rename(name, modules) or name): entry for name, entry in weights.entries.items()}


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
                result[f"{block}attn.in_proj_{leaf}"] = _stacked({n: entries[n] for n in names}, weights.files[0])
            elif module not in ("self_attn.k_proj", "self_attn.v_proj"):
                result[prefix + name] = entry  # for the caller to name
        elif not name.endswith("position_ids"):
            result[prefix + name] = entry
    return result


def _transposed(entry: Entry) -> Entry:
    return Entry(entry.shape[::-1], entry.dtype, lambda: entry.load().t().contiguous())


def _stacked(parts: dict[str, Entry], where: Path) -> Entry:
    """One below the other, in a dtype that holds the values of all."""
    entries = list(parts.values())
    shape, dtypes = entries[0].shape, {entry.dtype for entry in entries}
    for name, entry in parts.items():
        if entry.shape != shape or not shape:
            raise GgufSdError(
                f"{where}: tensor {name} has shape {list(entry.shape)}, {next(iter(parts))} {list(shape)}"
            )
    wide = torch.float64 if torch.float64 in dtypes else torch.float32
    dtype = dtypes.pop() if len(dtypes) == 1 else wide
    return Entry((3 * shape[0], *shape[1:]), dtype, lambda: torch.cat([entry.load().to(dtype) for entry in entries]))


def fitted(source: Source, expected: Tensors) -> tuple[dict[str, Entry], list[str]]:
    """As :func:`fit_tensors`, of a whole model."""
    whole = "a whole checkpoint or diffusers folder is needed: UNet, autoencoder and text encoder"
    return fit_tensors(source.tensors, expected, source.path, whole)


def fit_tensors(
    tensors: Mapping[str, Entry], expected: Tensors, path: Path, advice: str
) -> tuple[dict[str, Entry], list[str]]:
    """The tensors that the model takes, in the order of ``expected`` and with its shapes, and the names left over.

    1x1 convolutions may come as matrices and the other way round. Raises GgufSdError for what is missing, has
    another shape or is no floating-point tensor. No more of ``expected`` is drawn than the source can have.
    """
    wanted = dict(islice(expected, 2 * len(tensors) + 1))
    if missing := [name for name in wanted if name not in tensors]:
        raise GgufSdError(f"{path} lacks {len(missing)} of {len(wanted)} tensors, the first is {missing[0]}; {advice}")
    result = {}
    for name, shape in wanted.items():
        entry = tensors[name]
        if squeezed(entry.shape) != squeezed(shape):
            raise GgufSdError(f"{path}: tensor {name} has shape {list(entry.shape)}, the model takes {list(shape)}")
        if not entry.dtype.is_floating_point:
            raise GgufSdError(f"{path}: tensor {name} is {entry.dtype}; floating-point weights are needed")
        result[name] = replace(entry, shape=shape)
    return result, [name for name in tensors if name not in wanted]
