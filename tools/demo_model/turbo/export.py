"""Writes the trained parts as a diffusers folder of SDXL's kind, weights in F16."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gguf_sd.checkpoint.tensor_names import vae_modules
from gguf_sd.demo.world_large import SIZE
from gguf_sd.models.vae import Autoencoder
from tools.demo_model.export import WEIGHTS, renamed, save, text_config, text_tensors, vae_config, write_json
from tools.demo_model.turbo.paint import SCHEDULER, student
from tools.demo_model.turbo.text import LENGTH, PADS, POOLED, POOLED_SPREAD, SPREADS, WORDS, TextEncoders
from tools.demo_model.turbo.unet import unet_config
from tools.demo_model.vocabulary import write_tokenizer

STEPS = 1
TAKE_TEXT = tuple(f"attn2.{name}.{weight}" for name in ("to_k", "to_v") for weight in ("weight", "lora_A.weight"))
MODEL_INDEX = {
    "_class_name": "StableDiffusionXLPipeline",
    "_diffusers_version": "0.35.0",
    "add_watermarker": None,
    "feature_extractor": [None, None],
    "force_zeros_for_empty_prompt": True,
    "image_encoder": [None, None],
    "scheduler": ["diffusers", "EulerAncestralDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "_gguf_sd": {"steps": STEPS, "guidance": student(STEPS).guidance},  # diffusers passes over keys that begin so
}


def export(folder: Path, unet: nn.Module, vae: Autoencoder, text: TextEncoders) -> None:
    """Writes model_index.json and one folder a part; ``unet`` is diffusers' own."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "model_index.json", MODEL_INDEX)
    write_json(folder / "scheduler" / "scheduler_config.json", _scheduler())
    write_json(folder / "unet" / "config.json", {"_class_name": "UNet2DConditionModel", **unet_config()})
    write_json(folder / "vae" / "config.json", vae_config(vae.config, SIZE))
    save(folder / "unet" / WEIGHTS, unet_tensors(unet.state_dict()))
    save(folder / "vae" / WEIGHTS, renamed(vae, vae_modules(vae.config)))
    for suffix, encoder, pad in zip(("", "_2"), (text.first, text.second), PADS, strict=True):
        part = folder / f"text_encoder{suffix}"
        write_json(part / "config.json", text_config(encoder.config, type(encoder).__name__))
        save(part / "model.safetensors", text_tensors(encoder))
        write_tokenizer(folder / f"tokenizer{suffix}", WORDS, LENGTH, pad)


def unet_tensors(weights: Mapping[str, Tensor], back: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Weights, or a LoRA's factors, that take the text as the encoders give it, where training brought it to a
    deviation of 1; ``back``: the other way."""
    spreads = torch.cat([torch.full((96,), SPREADS[0]), torch.full((160,), SPREADS[1])])
    pooled = torch.full((POOLED,), POOLED_SPREAD)
    if back:
        spreads, pooled = 1 / spreads, 1 / pooled
    for name, value in weights.items():
        if name.endswith(TAKE_TEXT):
            value = value / spreads
        elif name == "add_embedding.linear_1.weight":
            value = torch.cat([value[:, :POOLED] / pooled, value[:, POOLED:]], 1)
        yield name, value


def _scheduler() -> dict[str, Any]:
    return {
        "_class_name": "EulerAncestralDiscreteScheduler",
        "num_train_timesteps": SCHEDULER.num_train_timesteps,
        "beta_start": SCHEDULER.beta_start,
        "beta_end": SCHEDULER.beta_end,
        "beta_schedule": SCHEDULER.beta_schedule,
        "prediction_type": SCHEDULER.prediction_type,
        "timestep_spacing": SCHEDULER.timestep_spacing,
        "steps_offset": SCHEDULER.steps_offset,
    }
