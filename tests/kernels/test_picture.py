"""A picture of the demo model with its UNet on the Triton kernels, against the same in plain torch and float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from gguf_sd import Pipeline
from gguf_sd.demo import model_folder
from gguf_sd.models.layers import Quantized
from gguf_sd.quality import psnr
from gguf_sd.runtime import execution, parts
from gguf_sd.runtime.kernel_modes import use_kernels
from gguf_sd_convert.convert import ConvertOptions, convert


@pytest.mark.parametrize(("kernels", "limit"), [("fused", 50), pytest.param("int8", 40, marks=pytest.mark.slow)])
def test_a_picture_on_the_kernels(
    kernels: str, limit: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """One step, 64x64 pixels. On a CPU, where Triton's interpreter runs the kernels, the CLI does not offer them."""
    path = tmp_path / "demo.gguf"
    convert(model_folder(), path, ConvertOptions(type="q4_0"), quiet=True)
    settings = {"prompt": "a red circle left of a blue square", "steps": 1, "seed": 3, "guidance": 1.0}
    # In 16 bits as well: torch before 2.13 draws another noise in them.
    (expected,) = Pipeline.load(path, device="cpu", dtype="float16", weights="quantized")(**settings)
    layers: list[str] = []

    def spy(unet: nn.Module, mode: str) -> None:
        use_kernels(unet, mode)
        layers.extend(module.mode for module in unet.modules() if isinstance(module, Quantized))

    monkeypatch.setattr(execution, "choose_kernels", lambda *asked: (kernels, "quantized"))
    monkeypatch.setattr(parts, "use_kernels", spy)
    (got,) = Pipeline.load(path, device=device.type, dtype="float16", cuda_graph="off")(**settings)
    assert psnr(got, expected) >= limit
    assert layers.count(kernels) > 40
