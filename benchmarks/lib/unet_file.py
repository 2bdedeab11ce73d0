"""A GGUF file with a full-size UNet of random weights and nothing else, written in seconds."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.lib.random_weights import CODE_RMS, random_blocks, weight_std
from gguf_sd.checkpoint import inventory
from gguf_sd.checkpoint import metadata_keys as keys
from gguf_sd.checkpoint.tensor_names import UNET
from gguf_sd.config import ModelConfig
from gguf_sd_convert.quantize.policy import Stored, plan
from gguf_sd_convert.writer import GGUFSink

PLAIN = {"F16": torch.float16, "F32": torch.float32}


def write_unet(path: Path, config: ModelConfig, qtype: str, device: torch.device, seed: int = 0) -> int:
    """Writes the UNet of ``config`` in ``qtype`` (such as "Q4_0") as the converter lays it out; returns its bytes.
    Random numbers are drawn on ``device``."""
    torch.manual_seed(seed)
    shapes = {UNET + name: shape for name, shape in inventory.unet(config.unet)}
    tensors = plan(shapes, qtype.lower(), "native")
    reshaped = {tensor.name: list(tensor.logical) for tensor in tensors if tensor.tap_major}
    metadata = {
        keys.FORMAT: keys.FORMAT_VERSION,
        keys.CONFIG: json.dumps(asdict(_fitting(config))),
        keys.SHAPES: json.dumps(reshaped),
    }
    with GGUFSink(path, config.name, metadata, tensors) as sink:
        for tensor in tensors:
            sink.write(tensor.name, _values(tensor, device).cpu())
    return path.stat().st_size


def _fitting(config: ModelConfig) -> ModelConfig:
    """With text encoders, of which none is in the file, that a tiny UNet could have."""
    width = config.unet.context_dim
    if len(config.text) > 1 or config.text[0].hidden_size == width:
        return config
    return replace(config, text=(replace(config.text[0], hidden_size=width, num_attention_heads=1),))


def _values(tensor: Stored, device: torch.device) -> Tensor:
    if tensor.type in CODE_RMS:
        rows, cols = tensor.shape
        return random_blocks(tensor.type, rows, cols, device, weight_std(tensor.name, tensor.logical))
    values = torch.randn(tensor.shape, device=device)
    if len(tensor.shape) > 1:
        values *= weight_std(tensor.name, tensor.logical)
    else:
        values = 0.1 * values + float(tensor.name.endswith(".weight"))  # of these only norms are called so
    return values.to(PLAIN[tensor.type])
