"""`convert --lora`: weights in the file against those of the source with the differences added in float64."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gguf_sd.adapters.lora import Lora, short_hash
from gguf_sd.cli.main import main
from gguf_sd.errors import GgufSdError
from gguf_sd.pipeline import Pipeline
from gguf_sd_convert.convert import ConvertOptions, convert
from gguf_sd_convert.merge_lora import place_of
from tests.adapters.conftest import config_of, kohya, random_lora, save
from tests.convert.conftest import Written
from tests.test_pipeline import psnr

SETTINGS: dict[str, Any] = {"steps": 2, "width": 64, "height": 64, "seed": 3, "safety": "off", "guidance": 4.0}


@pytest.mark.parametrize("xl", [False, True])
def test_every_layer_is_merged(
    tiny_pipeline: Callable[..., Path], converted: Callable[..., Written], tmp_path: Path, xl: bool
) -> None:
    """UNet and text encoders, SDXL's second with its queries, keys and values in one tensor."""
    folder = tiny_pipeline(xl=True, scheduler="EulerDiscreteScheduler") if xl else tiny_pipeline()
    plain = converted(folder, type="f16")
    config = config_of(tmp_path / "out.gguf")
    changes = random_lora(config)
    path = save(kohya(changes, config, original=xl), tmp_path / "style.safetensors")
    got = converted(folder, type="f16", loras=[Lora(path, 0.7)])
    expected = {name: plain.values(name).astype(np.float64) for name in plain.data}
    for target, tensors in changes.items():
        down, up = (tensors[f"lora_{x}.weight"].double().numpy() for x in ("down", "up"))
        delta = 0.7 * 2.0 / 3 * up.reshape(len(up), -1) @ down.reshape(len(down), -1)
        place = place_of(target, len(config.text))
        whole = expected[place.name]
        into = whole if place.third is None else np.split(whole, 3)[place.third]
        if len(target.shape) == 4:  # stored tap by tap, if quantised; F16 is not
            delta = delta.reshape(target.shape)
        into += (delta.T if place.transposed else delta).reshape(into.shape)
    assert set(got.data) == set(plain.data)
    for name, values in expected.items():
        error = np.abs(got.values(name) - values).max()
        assert error <= 2**-9 * max(np.abs(values).max(), 1e-3), name
    unchanged = [name for name in plain.data if np.array_equal(plain.data[name], got.data[name])]
    assert all(name.endswith(("bias", "norm.weight")) or plain.values(name).ndim == 1 or "embedding" in name
               or name.startswith("first_stage_model.") for name in unchanged)  # fmt: skip
    merged = json.loads(got.metadata["gguf_sd.loras"])
    assert merged == [["style", "0.7", short_hash(path)]]
    assert "gguf_sd.loras" not in plain.metadata
    assert got.metadata["gguf_sd.source.sha256"] != plain.metadata["gguf_sd.source.sha256"]


def test_merged_and_beside_paint_the_same(tiny_pipeline: Callable[..., Path], tmp_path: Path) -> None:
    plain, merged = tmp_path / "plain.gguf", tmp_path / "merged.gguf"
    convert(tiny_pipeline(), plain, ConvertOptions(type="f16"))
    path = save(kohya(random_lora(config_of(plain)), config_of(plain)), tmp_path / "style.safetensors")
    assert (
        main(["convert", str(tiny_pipeline()), "-o", str(merged), "--type", "f16", "--lora", f"{path}:0.5", "--quiet"])
        == 0
    )
    beside, within, without = (
        Pipeline.load(model, "cpu", "float32")("a cat", loras=loras, **SETTINGS)[0]
        for model, loras in ((plain, f"{path}:0.5"), (merged, ()), (plain, ()))
    )
    assert psnr(beside, within) >= 45
    assert psnr(without, within) < 30


def test_what_cannot_be_merged(tiny_pipeline: Callable[..., Path], tmp_path: Path) -> None:
    """Found before anything is written."""
    target = tmp_path / "out.gguf"
    state = {f"lora_unet_mid_block_attentions_0_proj_in.lora_{x}.weight": torch.ones(8, 8) for x in ("up", "down")}
    path = save(state, tmp_path / "other.safetensors")
    for loras, sentence in (
        ([path], "is for another model"),
        ([path, path], "is given twice"),
        (["nothing.safetensors"], "does not exist"),
    ):
        with pytest.raises(GgufSdError, match=sentence):
            convert(tiny_pipeline(), target, ConvertOptions(loras=loras))
        assert not target.exists()
