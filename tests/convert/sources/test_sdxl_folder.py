"""A diffusers folder of SDXL: two text encoders, the second under OpenCLIP's names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gguf_sd.checkpoint.model_file import ModelFile
from gguf_sd.config import SDXL_TURBO
from gguf_sd.errors import GgufSdError
from gguf_sd_convert.convert import ConvertOptions, convert

Make = Callable[..., Any]
FIRST, SECOND = "conditioner.embedders.0.transformer.text_model.", "conditioner.embedders.1.model."
WIDTHS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def folder(tiny_pipeline: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    vector = 48 + 6 * 256
    unet = {"cross_attention_dim": 64, "use_linear_projection": True, "addition_embed_type": "text_time"}
    unet |= {"addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": vector}
    folder = tmp_path_factory.mktemp("sdxl") / "tiny"
    shutil.copytree(tiny_pipeline(unet=unet, scheduler="EulerDiscreteScheduler"), folder)
    torch.manual_seed(4)
    config = CLIPTextConfig(vocab_size=520, projection_dim=48, hidden_act="gelu", **WIDTHS)
    CLIPTextModelWithProjection(config).save_pretrained(folder / "text_encoder_2")
    shutil.copytree(folder / "tokenizer", folder / "tokenizer_2")
    edit(folder / "tokenizer_2" / "tokenizer_config.json", pad_token="!")
    edit(folder / "model_index.json", _class_name="StableDiffusionXLPipeline")
    return folder


def edit(path: Path, **settings: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_values(folder: Path, converted: Make) -> None:
    written = converted(folder, type="q4_0", layout="comfy")
    assert written.metadata["general.architecture"] == "sdxl"
    second = {
        name.removeprefix("text_model."): tensor
        for name, tensor in load_file(folder / "text_encoder_2" / "model.safetensors").items()
    }
    layer = "encoder.layers.1."
    expected = {
        "token_embedding.weight": second["embeddings.token_embedding.weight"],
        "positional_embedding": second["embeddings.position_embedding.weight"],
        "text_projection": second["text_projection.weight"].T,
        "ln_final.bias": second["final_layer_norm.bias"],
        "transformer.resblocks.1.attn.in_proj_weight": torch.cat(
            [second[f"{layer}self_attn.{x}_proj.weight"] for x in "qkv"]
        ),
        "transformer.resblocks.1.attn.in_proj_bias": torch.cat(
            [second[f"{layer}self_attn.{x}_proj.bias"] for x in "qkv"]
        ),
        "transformer.resblocks.1.attn.out_proj.weight": second[f"{layer}self_attn.out_proj.weight"],
        "transformer.resblocks.1.mlp.c_fc.weight": second[f"{layer}mlp.fc1.weight"],
        "transformer.resblocks.1.mlp.c_proj.weight": second[f"{layer}mlp.fc2.weight"],
        "transformer.resblocks.1.ln_1.weight": second[f"{layer}layer_norm1.weight"],
        "transformer.resblocks.1.ln_2.weight": second[f"{layer}layer_norm2.weight"],
    }
    for name, tensor in expected.items():
        assert np.allclose(written.values(SECOND + name), tensor.numpy(), atol=1e-3, rtol=1e-3), name
    first = load_file(folder / "text_encoder" / "model.safetensors")
    embedding = next(t for n, t in first.items() if n.endswith("token_embedding.weight"))
    assert np.allclose(written.values(FIRST + "embeddings.token_embedding.weight"), embedding.numpy(), atol=3e-3)
    assert written.types["model.diffusion_model.label_emb.0.0.weight"] == "F16"
    assert written.types["model.diffusion_model.middle_block.1.proj_in.weight"] == "Q4_0"


def test_config(folder: Path, converted: Make) -> None:
    config = json.loads(converted(folder).metadata["gguf_sd.config"])
    assert config["name"] == "sdxl"
    assert config["unet"]["vector_dim"] == 48 + 6 * 256
    assert [text["projection_dim"] for text in config["text"]] == [0, 48]
    vocabulary = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]
    assert config["text"][0]["pad_token_id"] == config["text"][0]["eos_token_id"]
    assert config["text"][1]["pad_token_id"] == vocabulary["!"]
    assert (config["defaults"]["sampler"], config["defaults"]["guidance"]) == ("euler", 5.0)


def test_turbo_scheduler(folder: Path, converted: Make, tmp_path: Path) -> None:
    turbo = tmp_path / "turbo"
    shutil.copytree(folder, turbo)
    edit(
        turbo / "scheduler" / "scheduler_config.json",
        _class_name="EulerAncestralDiscreteScheduler",
        timestep_spacing="trailing",
    )
    defaults = json.loads(converted(turbo).metadata["gguf_sd.config"])["defaults"]
    assert (defaults["sampler"], defaults["steps"], defaults["guidance"]) == ("euler_a", 1, 0.0)


@pytest.mark.parametrize(
    ("path", "settings", "match"),
    [
        ("text_encoder_2/config.json", {"projection_dim": 32}, "projection_class_embeddings_input_dim"),
        ("unet/config.json", {"addition_time_embed_dim": 128}, "addition_time_embed_dim"),
        ("unet/config.json", {"addition_embed_type": None}, "addition_embed_type"),
        ("tokenizer_2/tokenizer_config.json", {"bos_token": "!"}, "tokenizer and tokenizer_2 differ"),
    ],
)
def test_parts_that_do_not_fit(folder: Path, tmp_path: Path, path: str, settings: Any, match: str) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    edit(broken / path, **settings)
    with pytest.raises(GgufSdError, match=match):
        convert(broken, tmp_path / "x.gguf")


def test_turbo_is_a_preset_and_a_name_is_only_a_hint(folder: Path, tmp_path: Path) -> None:
    named = shutil.copytree(folder, tmp_path / "my-turbo")
    report = convert(named, tmp_path / "a.gguf")
    assert any("--preset sdxl-turbo" in note for note in report.notes)
    assert ModelFile.open(tmp_path / "a.gguf").config.defaults.steps != 1
    report = convert(folder, tmp_path / "b.gguf", ConvertOptions(preset="sdxl-turbo"))
    assert not any("--preset" in note for note in report.notes)
    config = ModelFile.open(tmp_path / "b.gguf").config
    assert (config.defaults, config.scheduler) == (SDXL_TURBO.defaults, SDXL_TURBO.scheduler)
    with pytest.raises(GgufSdError, match="preset sd15 is for sd1 models"):
        convert(folder, tmp_path / "c.gguf", ConvertOptions(preset="sd15"))
    with pytest.raises(GgufSdError, match="no preset 'turbo'; choose from sd15, sdxl, sdxl-turbo"):
        convert(folder, tmp_path / "c.gguf", ConvertOptions(preset="turbo"))
