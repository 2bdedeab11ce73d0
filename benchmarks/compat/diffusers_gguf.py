"""diffusers' GGUF loader on files of the `linear` layout: the same UNet as ours, in float32 on the CPU."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from gguf_sd.checkpoint.model_file import ModelFile
from gguf_sd.integrations.diffusers import diffusers_config


@torch.inference_mode()
def compare(path: Path, side: int = 16) -> dict[str, Any]:
    """The largest difference of a step's output on random latents [1, 4, side, side], relative to the largest value."""
    from diffusers import GGUFQuantizationConfig, UNet2DConditionModel

    model = ModelFile.open(path)
    config = model.config.unet
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "unet").mkdir()
        (Path(folder) / "unet" / "config.json").write_text(json.dumps(diffusers_config(model.config)))
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
