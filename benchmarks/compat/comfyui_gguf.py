"""ComfyUI-GGUF's own loader on files of the `comfy` layout: does it take them, and does it decode what we decode?

The loader comes from a checkout of https://github.com/city96/ComfyUI-GGUF, whose folder is given; it runs without
ComfyUI, of which it takes nothing to read a file.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import nn

from gguf_sd.checkpoint.model_file import ModelFile
from gguf_sd.checkpoint.quant_tensor import QuantTensor
from gguf_sd.checkpoint.tensor_names import UNET


def loader(checkout: Path) -> tuple[Any, Any]:
    """The functions gguf_sd_loader and dequantize_tensor of a checkout."""
    layers = {name: getattr(nn, name) for name in ("Linear", "Conv2d", "Embedding", "LayerNorm", "GroupNorm")}
    stand_ins = {"comfy.ops": SimpleNamespace(manual_cast=type("manual_cast", (), layers))}
    stand_ins |= dict.fromkeys(("comfy", "comfy.lora", "comfy.model_management"), SimpleNamespace())
    for name, values in stand_ins.items():
        module = sys.modules.setdefault(name, ModuleType(name))
        module.__dict__.update(vars(values))
        parent, _, leaf = name.rpartition(".")
        if parent:
            setattr(sys.modules.setdefault(parent, ModuleType(parent)), leaf, module)
    package = ModuleType("comfyui_gguf")
    package.__path__ = [str(checkout)]
    sys.modules["comfyui_gguf"] = package
    module = importlib.import_module("comfyui_gguf.loader")
    return module.gguf_sd_loader, importlib.import_module("comfyui_gguf.dequant").dequantize_tensor


def compare(path: Path, checkout: Path) -> dict[str, Any]:
    """Its tensors against ours: names, shapes, and values in float32."""
    load, decode = loader(checkout)
    theirs, architecture = load(str(path), return_arch=True)
    model = ModelFile.open(path)
    ours = {name.removeprefix(UNET): name for name in model.names if name.startswith(UNET)}
    differing, quantised = [], 0
    for local, canonical in ours.items():
        stored = model.file.tensor(model.names[canonical])
        mine = stored.dequantize(torch.float32) if isinstance(stored, QuantTensor) else stored.float()
        other = decode(theirs[local], torch.float32, torch.float32)
        quantised += isinstance(stored, QuantTensor)
        if tuple(theirs[local].shape) != tuple(mine.shape) or not torch.equal(torch.as_tensor(other), mine):
            differing.append(canonical)
    return {
        "architecture": architecture,
        "tensors": len(ours),
        "quantised": quantised,
        "same_names": set(theirs) == set(ours),
        "differing": differing,
    }
