"""Writes the trained parts as a diffusers folder, weights in F16."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from gguf_sd.checkpoint.tensor_names import inverted, rename, unet_modules, vae_modules
from gguf_sd.config import SchedulerConfig, UNetConfig, VAEConfig
from gguf_sd.demo.world import SIZE
from gguf_sd.models.unet import UNet
from gguf_sd.models.vae import Autoencoder
from tools.demo_model.paint import GUIDANCE, STEPS
from tools.demo_model.vocabulary import write_tokenizer

POINTWISE = ("conv_shortcut", "quant_conv", "proj_in", "proj_out")  # 1x1 convolutions in diffusers
WEIGHTS = "diffusion_pytorch_model.safetensors"
MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.35.0",
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "_gguf_sd": {"steps": STEPS, "guidance": GUIDANCE},  # diffusers passes over keys that begin so
}


def export(folder: Path, unet: UNet, vae: Autoencoder, text: CLIPTextModel) -> None:
    """Writes model_index.json and one folder a part."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "model_index.json", MODEL_INDEX)
    write_json(folder / "scheduler" / "scheduler_config.json", _scheduler())
    write_json(folder / "unet" / "config.json", _unet(unet.config))
    write_json(folder / "vae" / "config.json", vae_config(vae.config))
    save(folder / "unet" / WEIGHTS, renamed(unet, unet_modules(unet.config)))
    save(folder / "vae" / WEIGHTS, renamed(vae, vae_modules(vae.config)))
    write_json(folder / "text_encoder" / "config.json", text_config(text.config))
    save(folder / "text_encoder" / "model.safetensors", text_tensors(text))
    write_tokenizer(folder / "tokenizer")


def text_tensors(text: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Tensors under the names that transformers 4 gave them; of a projection as it is called there and here."""
    for name, value in text.state_dict().items():
        outside = name.startswith("text_projection.")
        yield name if outside else f"text_model.{name.removeprefix('text_model.')}", value


def renamed(model: nn.Module, modules: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    """Tensors under diffusers' names; the 1x1 convolutions that we hold as matrices get their kernel back."""
    for name, value in model.state_dict().items():
        new = rename(name, inverted(modules))
        if new is None:
            raise KeyError(f"{name} has no name in diffusers")
        if value.ndim == 2 and new.removesuffix(".weight").endswith(POINTWISE):
            value = value[:, :, None, None]
        yield new, value


def save(path: Path, tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Writes a safetensors file in F16."""
    save_file({n: t.to(torch.float16).contiguous() for n, t in tensors}, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors writes files for the owner's eyes only


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Writes an object, and the folder where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2) + "\n")


def _scheduler() -> dict[str, Any]:
    config = SchedulerConfig()
    return {
        "_class_name": "DPMSolverMultistepScheduler",
        "num_train_timesteps": config.num_train_timesteps,
        "beta_start": config.beta_start,
        "beta_end": config.beta_end,
        "beta_schedule": config.beta_schedule,
        "prediction_type": config.prediction_type,
        "timestep_spacing": "linspace",
        "steps_offset": config.steps_offset,
        "algorithm_type": "dpmsolver++",
        "solver_order": 2,
        "solver_type": "midpoint",
        "lower_order_final": True,
        "final_sigmas_type": "zero",
    }


def _unet(config: UNetConfig) -> dict[str, Any]:
    crossed = ["CrossAttn" if depth else "" for depth in config.transformer_layers]
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": SIZE // 8,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "block_out_channels": config.block_out_channels,
        "layers_per_block": config.layers_per_block,
        "down_block_types": [f"{cross}DownBlock2D" for cross in crossed],
        "up_block_types": [f"{cross}UpBlock2D" for cross in reversed(crossed)],
        "transformer_layers_per_block": [max(depth, 1) for depth in config.transformer_layers],
        "attention_head_dim": config.num_heads,  # diffusers' name for the number of heads
        "cross_attention_dim": config.context_dim,
        "norm_num_groups": config.norm_groups,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
    }


def vae_config(config: VAEConfig, size: int = SIZE) -> dict[str, Any]:
    """diffusers' config of the autoencoder of a model that paints ``size`` pixels along each side."""
    levels = len(config.block_out_channels)
    return {
        "_class_name": "AutoencoderKL",
        "sample_size": size,
        "in_channels": config.in_channels,
        "out_channels": config.in_channels,
        "latent_channels": config.latent_channels,
        "block_out_channels": config.block_out_channels,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": config.layers_per_block,
        "norm_num_groups": config.norm_groups,
        "scaling_factor": config.scaling_factor,
    }


def text_config(config: CLIPTextConfig, architecture: str = "CLIPTextModel") -> dict[str, Any]:
    """transformers' config of a text encoder."""
    keys = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads max_position_embeddings "
        "hidden_act projection_dim bos_token_id eos_token_id pad_token_id"
    )
    return {
        "architectures": [architecture],
        "model_type": "clip_text_model",
        "dtype": "float32",  # to compute in: transformers would otherwise take half precision from the weights
        **{key: getattr(config, key) for key in keys.split()},
    }
