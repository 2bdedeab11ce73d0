"""diffusers' UNets with random weights, in full and with GGUF linears, as baselines of ours."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.lib.random_weights import random_blocks, weight_std
from gguf_sd.config import UNetConfig

# diffusers leaves these in 16 bits, as GGUF files of other tools do.
PLAIN = ("time_embedding.", "add_embedding.", "time_emb_proj.")


@cache
def missing(*modules: str) -> str:
    """Why baselines that need these modules cannot run here; empty where they can."""
    for name in modules:
        try:
            importlib.import_module(name)
        except Exception as problem:  # diffusers raises RuntimeError for what its own imports lack
            return f"{name} cannot be imported: {str(problem).strip().splitlines()[-1]}"
    return ""


def diffusers_settings(config: UNetConfig) -> dict[str, Any]:
    """Arguments of diffusers' UNet2DConditionModel for a UNet of these sizes."""
    down = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in config.transformer_layers]
    settings: dict[str, Any] = {
        "in_channels": config.in_channels,
        "block_out_channels": config.block_out_channels,
        "layers_per_block": config.layers_per_block,
        "down_block_types": down,
        "up_block_types": [kind.replace("Down", "Up") for kind in reversed(down)],
        "transformer_layers_per_block": [max(depth, 1) for depth in config.transformer_layers],
        "attention_head_dim": config.num_heads,
        "cross_attention_dim": config.context_dim,
        "use_linear_projection": config.linear_projection,
        "norm_num_groups": config.norm_groups,
    }
    if config.vector_dim:
        settings |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
        settings |= {"projection_class_embeddings_input_dim": config.vector_dim}
    return settings


@torch.no_grad()
def diffusers_unet(config: UNetConfig, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Random weights of the same spread as in random_weights.random_unet, channels-last."""
    from diffusers import UNet2DConditionModel
    from diffusers.utils import logging

    logging.set_verbosity_error()  # it warns of casts that change nothing here
    with torch.device("meta"):
        unet = UNet2DConditionModel(**diffusers_settings(config))
    unet = unet.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    for name, parameter in unet.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=weight_std(name, tuple(parameter.shape)))
        else:
            parameter.normal_(std=0.1).add_(float(name.endswith(".weight")))
    return unet.to(memory_format=torch.channels_last)


def with_gguf_linears(unet: nn.Module, qtype: str) -> nn.Module:
    """``unet`` with its linears as diffusers loads them from GGUF files, in blocks of ``qtype`` ("Q4_0"); convolutions
    stay as they are, as diffusers does not quantise them. In place."""
    import gguf
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    kind = gguf.GGMLQuantizationType[qtype]
    for name, module in list(unet.named_modules()):
        if not isinstance(module, nn.Linear) or any(part in f"{name}." for part in PLAIN):
            continue
        rows, cols = module.weight.shape
        with torch.device("meta"):
            linear = GGUFLinear(cols, rows, module.bias is not None, compute_dtype=module.weight.dtype)
        blocks = random_blocks(qtype, rows, cols, module.weight.device, weight_std(f"{name}.", (rows, cols)))
        linear.weight = GGUFParameter(blocks, quant_type=kind)
        linear.bias = module.bias
        unet.set_submodule(name, linear)
    return unet


def step_of(unet: Callable[..., Any], inputs: list[Tensor]) -> Callable[[], Tensor]:
    """A step on the inputs that random_weights.unet_inputs makes."""
    latents, timesteps, context, *vectors = inputs
    latents = latents.contiguous(memory_format=torch.channels_last)
    more: dict[str, Any] = {"return_dict": False}
    if vectors:
        pooled = vectors[0].shape[1] - 6 * 256  # the rest embeds six sizes
        sizes = torch.full((len(latents), 6), 512.0, device=latents.device, dtype=latents.dtype)
        more["added_cond_kwargs"] = {"text_embeds": vectors[0][:, :pooled], "time_ids": sizes}
    return lambda: unet(latents, timesteps, context, **more)[0]
