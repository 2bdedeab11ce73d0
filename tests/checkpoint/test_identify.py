"""Names and shapes of other tools' files: which model they are, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from gguf_sd.checkpoint.identify import identify
from gguf_sd.checkpoint.inventory import expected_tensors
from gguf_sd.checkpoint.tensor_names import UNET, canonical_names, inverted, rename, unet_modules, vae_modules
from gguf_sd.config import SD15, SD15_INPAINT, SDXL, ModelConfig
from gguf_sd.errors import GgufSdError

MODELS = {"sd15": SD15, "inpainting": SD15_INPAINT, "sdxl": SDXL}


def sd_cpp(name: str) -> str:
    """As stable-diffusion.cpp calls it when it converts a diffusers folder."""
    name = name.replace("conditioner.embedders.0.", "cond_stage_model.")
    return name.replace("conditioner.embedders.1.", "cond_stage_model.1.")


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("written", [lambda n: n, lambda n: n.replace(UNET, "unet."), sd_cpp])
def test_models_are_told_by_names_and_shapes(model: str, written: Callable[[str], str]) -> None:
    expected = expected_tensors(MODELS[model])
    names = canonical_names([written(name) for name in expected])
    assert set(names) == set(expected)
    assert identify({c: expected[c] for c in names}, "x.gguf") == MODELS[model]


def test_a_bare_unet_gets_its_prefix() -> None:
    unet = [name for name in expected_tensors(SD15) if name.startswith(UNET)]
    assert canonical_names(name.removeprefix(UNET) for name in unet) == {n: n.removeprefix(UNET) for n in unet}


def test_training_leftovers_are_ignored() -> None:
    names = ["betas", "model_ema.decay", "cond_stage_model.transformer.text_model.embeddings.position_ids", "logvar"]
    assert canonical_names(names) == {}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (replace(SD15, unet=replace(SD15.unet, context_dim=1024)), "x.gguf holds Stable Diffusion 2 "),
        (replace(SD15, unet=replace(SD15.unet, in_channels=8)), r"unknown shape \(first convolution \[320, 8, 3, 3\]"),
        (
            replace(SD15, unet=replace(SD15.unet, block_out_channels=(64, 128, 256, 256))),
            "other widths only as a diffusers folder",
        ),
    ],
)
def test_other_unets_are_refused(config: ModelConfig, message: str) -> None:
    with pytest.raises(GgufSdError, match=message):
        identify(expected_tensors(config), "x.gguf")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.diffusion_model.double_blocks.0.img_attn.qkv.weight", "checkpoint of Flux"),
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "Stable Diffusion 3"),
        ("blk.0.attn_q.weight", "a language model"),
        ("something.else", "holds no Stable Diffusion UNet"),
    ],
)
def test_other_architectures_are_refused(name: str, message: str) -> None:
    with pytest.raises(GgufSdError, match=message):
        identify({name: (8, 8)}, "x.gguf")


@pytest.mark.parametrize("config", [SD15, SDXL])
def test_renaming_there_and_back(config: ModelConfig) -> None:
    """Every UNet and autoencoder name has one diffusers name."""
    for prefix, modules in ((UNET, unet_modules(config.unet)), ("first_stage_model.", vae_modules(config.vae))):
        own = [n.removeprefix(prefix) for n in expected_tensors(config) if n.startswith(prefix)]
        theirs = [rename(name, inverted(modules)) for name in own]
        assert None not in theirs
        assert len(set(theirs)) == len(own)
        assert [rename(str(name), modules) for name in theirs] == own
