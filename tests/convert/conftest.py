"""What the converter's tests share: reading a GGUF with gguf-py, and the sources that a pipeline can come as."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gguf_sd.checkpoint.tensor_names import TEXT, UNET, VAE, rename, unet_modules, vae_modules
from gguf_sd_convert.convert import ConvertOptions, convert
from gguf_sd_convert.sources.diffusers_config import read_model_config


@dataclass
class Written:
    """A GGUF file as gguf-py sees it; shapes in torch order, values as float32 in the shape they are stored in."""

    metadata: dict[str, Any]
    types: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    data: dict[str, np.ndarray]

    def values(self, name: str) -> np.ndarray:
        kind = gguf.GGMLQuantizationType[self.types[name]]
        return gguf.quants.dequantize(self.data[name], kind).reshape(self.shapes[name])


def read(path: Path) -> Written:
    reader = gguf.GGUFReader(path)
    return Written(
        {key: field.contents() for key, field in reader.fields.items()},
        {t.name: t.tensor_type.name for t in reader.tensors},
        {t.name: tuple(int(n) for n in reversed(t.shape)) for t in reader.tensors},
        {t.name: np.array(t.data) for t in reader.tensors},
    )


@pytest.fixture
def converted(tmp_path: Path) -> Callable[..., Written]:
    """A function from a source and ConvertOptions' fields to the file written."""

    def run(source: Path, **options: Any) -> Written:
        target = tmp_path / "out.gguf"
        convert(source, target, ConvertOptions(force=True, **options))
        return read(target)

    return run


def ldm_state(folder: Path) -> dict[str, torch.Tensor]:
    """A diffusers pipeline's weights as an original checkpoint has them."""
    config, _ = read_model_config(folder)
    state = {}
    for name, tensor in load_file(folder / "unet" / "diffusion_pytorch_model.safetensors").items():
        new = rename(name, unet_modules(config.unet))
        state[f"{UNET}{new}"] = tensor
    for name, tensor in load_file(folder / "vae" / "diffusion_pytorch_model.safetensors").items():
        new = rename(name, vae_modules(config.vae))
        attention = ".attn_1." in f"{new}" and tensor.dim() == 2
        state[f"{VAE}{new}"] = tensor[:, :, None, None] if attention else tensor
    for name, tensor in load_file(folder / "text_encoder" / "model.safetensors").items():
        state[f"{TEXT}text_model.{name.removeprefix('text_model.')}"] = tensor
    return {name: tensor.contiguous() for name, tensor in state.items()}


@dataclass
class SingleFile:
    """An original checkpoint of a tiny pipeline, and what is needed to convert it."""

    state: dict[str, torch.Tensor]
    options: dict[str, Any]

    def save(self, path: Path, **changed: torch.Tensor) -> Path:
        if path.suffix == ".ckpt":
            torch.save({"state_dict": self.state | changed, "global_step": 3}, path)
        else:
            save_file(self.state | changed, path)
        return path


@pytest.fixture
def single_file(tiny_pipeline: Callable[..., Path]) -> Callable[..., SingleFile]:
    """A function from the fields of Tiny to the same weights under their original names."""

    def make(**fields: Any) -> SingleFile:
        folder = tiny_pipeline(**fields)
        config, _ = read_model_config(folder)
        return SingleFile(ldm_state(folder), {"config": config, "tokenizer": folder / "tokenizer"})

    return make


@pytest.fixture
def edited_folder(tiny_pipeline: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A function from a component and settings to a copy of the tiny pipeline whose JSON has them."""
    import shutil

    def edit(component: str, **settings: Any) -> Path:
        folder = tmp_path / "edited"
        shutil.copytree(tiny_pipeline(), folder)
        path = folder / component / ("scheduler_config.json" if component == "scheduler" else "config.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
        return folder

    return edit
