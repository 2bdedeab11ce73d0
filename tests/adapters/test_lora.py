"""Pictures with LoRAs against diffusers with peft, on the weights that the file decodes to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gguf_sd.pipeline import Pipeline
from gguf_sd.quality import psnr
from gguf_sd.request import Request

from .conftest import all_targets, config_of, kohya, peft, random_lora, save

SETTINGS: dict[str, Any] = {"steps": 2, "width": 64, "height": 64, "seed": 3, "safety": "off", "sampler": "ddim"}


def test_weight_changes(tiny_file: Callable[..., Path], tmp_path: Path) -> None:
    model = tiny_file()
    config = config_of(model)
    lora = save(kohya(random_lora(all_targets(config)), config), tmp_path / "style.safetensors")
    pipeline = Pipeline.load(model, "cpu", "float32", "quantized")
    plain, zero, half, whole, again = (
        np.asarray(pipeline("a cat", loras=x, **SETTINGS)[0]).astype(int) for x in ((), (lora, 0), (lora, 0.5), lora, ())
    )
    print(np.abs(half - plain).mean(), np.abs(whole - plain).mean())
    assert (plain == zero).all() and (plain == again).all()
