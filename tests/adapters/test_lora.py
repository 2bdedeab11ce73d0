"""Pictures with LoRAs against diffusers with peft, on the weights that the GGUF file decodes to."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gguf_sd.config import ModelConfig
from gguf_sd.pipeline import Pipeline
from tests.adapters.conftest import (
    DIFFUSERS,
    all_targets,
    config_of,
    kohya,
    name_of,
    peft,
    random_lora,
    reads_loras,
    save,
)
from tests.test_pipeline import oracle, paint_with, psnr

SETTINGS: dict[str, Any] = {"steps": 2, "width": 64, "height": 64, "guidance": 4.0}
OURS = SETTINGS | {"seed": 3, "safety": "off", "negative_prompt": "blurry"}
PROMPT = "a red cat beside a dog"


def difference(a: Any, b: Any) -> float:
    return float(np.abs(np.asarray(a, float) - np.asarray(b, float)).mean())


def peft_header(config: ModelConfig) -> dict[str, str]:
    """What diffusers writes of its adapters: alpha, another for one layer, and the layers."""
    values: dict[str, Any] = {}
    for part in dict.fromkeys(target.part for target in all_targets(config)):
        layers = [name_of(target, config) for target in all_targets(config, [part])]
        values |= {f"{DIFFUSERS[part]}{key}": value for key, value in (("r", 3), ("lora_alpha", 2.0))}
        if part == "unet":
            values |= {"unet.target_modules": layers, "unet.alpha_pattern": {layers[5]: 5.0}}
        else:  # transformers 5 has no text_model. in front of the first encoder's
            values[f"{DIFFUSERS[part]}target_modules"] = sorted({layer.rpartition(".")[2] for layer in layers})
    return {"lora_adapter_metadata": json.dumps(values)}


@reads_loras
@pytest.mark.parametrize(("xl", "kind"), [(False, "q4_0"), (True, "q8_0")])
@pytest.mark.parametrize("names", ["kohya", "peft"])
def test_pictures_equal_diffusers_with_peft(
    tiny_file: Callable[..., Path],
    tiny_pipeline: Callable[..., Path],
    tmp_path: Path,
    xl: bool,
    kind: str,
    names: str,
) -> None:
    pytest.importorskip("peft")
    fields = {"xl": True, "scheduler": "EulerDiscreteScheduler"} if xl else {}
    model = tiny_file(kind, **fields)
    config = config_of(model)
    if names == "kohya":  # whose add_embedding diffusers does not know by this name
        layers = [target for target in all_targets(config) if not target.module.startswith("label_emb")]
        state = kohya(random_lora(config, layers), config, original=xl)
        file = save(state, tmp_path / "style.safetensors")
    else:
        file = save(
            peft(random_lora(config, alpha=None), config), tmp_path / "style.safetensors", **peft_header(config)
        )

    reference = oracle(tiny_pipeline(**fields), model)
    plain = paint_with(reference, [3], **SETTINGS)[0]
    reference.load_lora_weights(file.parent, weight_name=file.name, adapter_name="style")
    reference.set_adapters(["style"], [0.7])
    expected = paint_with(reference, [3], **SETTINGS)[0]
    got = Pipeline.load(model, "cpu", "float32", "quantized")(PROMPT, loras=f"{file}:0.7", **OURS)[0]
    assert psnr(got, expected) >= 45
    assert psnr(plain, expected) < 30, "the LoRA makes no difference: the comparison is blind"
