"""diffusers' GGUF loader on files of the `linear` layout: the same UNet as ours, in float32 on the CPU."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from gguf_sd.checkpoint.model_file import ModelFile
from gguf_sd.config import UNetConfig


def unet_json(config: UNetConfig) -> dict[str, Any]:
    """A UNet's configuration in diffusers' words."""
    levels = len(config.block_out_channels)
    down = ["CrossAttnDownBlock2D" if n else "DownBlock2D" for n in config.transformer_layers]
    vector = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": config.vector_dim,
    }
    return {
        "_class_name": "UNet2DConditionModel",
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "block_out_channels": list(config.block_out_channels),
        "layers_per_block": config.layers_per_block,
        "down_block_types": down,
        "up_block_types": [kind.replace("Down", "Up") for kind in reversed(down)],
        "transformer_layers_per_block": [max(n, 1) for n in config.transformer_layers][:levels],
        "attention_head_dim": list(config.num_heads),
        "cross_attention_dim": config.context_dim,
        "use_linear_projection": config.linear_projection,
        "norm_num_groups": config.norm_groups,
        "sample_size": 64,
        **(vector if config.vector_dim else {}),
    }


@torch.inference_mode()
def compare(path: Path, side: int = 16) -> dict[str, Any]:
    """The largest difference of a step's output on random latents [1, 4, side, side], relative to the largest value."""
    from diffusers import GGUFQuantizationConfig, UNet2DConditionModel

    model = ModelFile.open(path)
    config = model.config.unet
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "unet").mkdir()
        (Path(folder) / "unet" / "config.json").write_text(json.dumps(unet_json(config)))
        theirs = UNet2DConditionModel.from_single_file(
            str(path),
            quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
            config=folder,
            subfolder="unet",
            torch_dtype=torch.float32,
        )
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, config.in_channels, side, side, generator=generator)
    context = torch.randn(1, 77, config.context_dim, generator=generator)
    timestep = torch.tensor([321])
    expected = theirs(latents, timestep, context).sample
    quantised = sum(hasattr(parameter, "quant_type") for parameter in theirs.parameters())
    del theirs
    got = model.load_unet(torch.float32)(latents, timestep, context)
    error = (got - expected).abs().max() / expected.abs().max()
    return {"quantised_in_diffusers": quantised, "relative_error": float(error)}
