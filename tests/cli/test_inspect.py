"""`gguf-sd inspect`: models of every form, and what other files are told to be."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from gguf_sd.checkpoint.what_is_it import what_is
from gguf_sd.cli.main import main


def sparse(path: Path, shapes: dict[str, tuple[int, ...]], metadata: dict[str, str] | None = None) -> Path:
    """A safetensors file of F16 tensors whose data takes no room on the disk."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [at, at := at + 2 * prod(shape)]}
    data = json.dumps(header).encode()
    path.write_bytes(len(data).to_bytes(8, "little") + data)
    with open(path, "r+b") as file:
        file.truncate(8 + len(data) + at)
    return path


def model_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    from gguf_sd.checkpoint.inventory import expected_tensors

    shapes: dict[str, tuple[int, ...]] = expected_tensors(config)
    return shapes


def facts_of(path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["inspect", str(path), "--json", "--tensors"]) == 0
    facts: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert main(["inspect", str(path)]) == 0
    shown = capsys.readouterr().out
    assert str(path) in shown
    assert facts.get("is", "") in shown
    return facts


@pytest.mark.parametrize("name", ["SD15", "SDXL"])
def test_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    from gguf_sd import config

    shapes = model_shapes(getattr(config, name))
    path = sparse(tmp_path / "m.safetensors", shapes, {"modelspec.title": "A model"})
    facts = facts_of(path, capsys)
    assert (facts["architecture"], facts["format"]) == ("sd1" if name == "SD15" else "sdxl", "safetensors")
    texts = {"text encoder"} if name == "SD15" else {"text encoder 1", "text encoder 2"}
    assert set(facts["parts"]) == {"unet", "vae"} | texts
    assert sum(t["F16"]["tensors"] for t in facts["parts"].values()) == len(shapes) == len(facts["tensors"])
    assert sum(t["F16"]["bytes"] for t in facts["parts"].values()) == 2 * sum(map(prod, shapes.values()))
    assert facts["config"]["defaults"]["width"] in (512, 1024)
    assert facts["metadata"] == {"modelspec.title": "A model"}


def test_a_pickled_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "lora.ckpt"
    torch.save({"lora_unet_down_blocks_0.lora_down.weight": torch.ones(4, 8)}, path)
    facts = facts_of(path, capsys)
    assert (facts["format"], facts["is"]) == ("pickled checkpoint", "a LoRA")
    assert facts["parts"] == {"tensors": {"float32": {"tensors": 1, "values": 32, "bytes": 128}}}


@pytest.mark.parametrize("xl", [False, True])
def test_a_diffusers_folder(tiny_pipeline: Callable[..., Path], capsys: pytest.CaptureFixture[str], xl: bool) -> None:
    facts = facts_of(tiny_pipeline(xl=xl), capsys)
    assert facts["architecture"] == ("sdxl" if xl else "sd1")
    assert facts["is"] == ("a StableDiffusionXLPipeline" if xl else "a StableDiffusionPipeline")
    assert set(facts["parts"]) == {"unet", "vae", "text_encoder"} | ({"text_encoder_2"} if xl else set())
    assert facts["parts"]["unet"]["F32"]["bytes"] > 0


def test_parts_of_diffusers(
    tiny_pipeline: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Folders that diffusers itself saved."""
    import diffusers

    unet = diffusers.UNet2DConditionModel.from_pretrained(tiny_pipeline() / "unet")
    diffusers.ControlNetModel.from_unet(unet).save_pretrained(tmp_path / "control")
    tiny = diffusers.AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4)
    tiny.save_pretrained(tmp_path / "tiny")
    told = {
        tiny_pipeline() / "unet": "a UNet alone",
        tiny_pipeline() / "vae": "a VAE alone",
        tiny_pipeline() / "text_encoder": "a text encoder alone",
        tmp_path / "control": "a ControlNet",
        tmp_path / "tiny": "a tiny autoencoder (TAESD)",
        tmp_path / "tiny" / "diffusion_pytorch_model.safetensors": "a tiny autoencoder (TAESD)",
    }
    assert {path: facts_of(path, capsys)["is"] for path in told} == told


NAMES = {
    "a LoRA": [
        ["lora_unet_mid_block_attentions_0_proj_in.alpha", "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight"],
        ["lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"],
        ["unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k.lora_A.weight"],
        ["unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_k_lora.down.weight"],
        ["base_model.model.down_blocks.0.attentions.0.proj_in.lora_B.default.weight"],
        ["lora_unet_mid_block_attentions_0_proj_in.hada_w1_a"],
        ["unet.mid_block.attentions.0.to_q.lokr_w1"],
    ],
    "a ControlNet": [
        ["control_model.input_blocks.0.0.weight", "control_model.zero_convs.0.0.weight"],
        ["controlnet_cond_embedding.conv_in.weight", "time_embedding.linear_1.weight", "conv_in.weight"],
    ],
    "a VAE alone": [
        ["encoder.conv_in.weight", "decoder.mid.block_1.norm1.weight", "quant_conv.weight"],
        ["first_stage_model.decoder.conv_in.weight"],
        ["decoder.mid_block.attentions.0.to_q.weight"],
    ],
    "a tiny autoencoder (TAESD)": [["0.weight", "0.bias", "1.conv.0.weight"], ["decoder.layers.3.conv.2.bias"]],
    "a UNet alone": [["input_blocks.0.0.weight", "out.2.weight"], ["model.diffusion_model.input_blocks.0.0.weight"]],
    "a checkpoint of Flux": [["model.diffusion_model.double_blocks.0.img_attn.qkv.weight"]],
    "a checkpoint of Stable Diffusion 3": [
        ["joint_blocks.0.x_block.attn.qkv.weight", "first_stage_model.decoder.conv_in.weight"]
    ],
    "a checkpoint of a language model": [
        ["blk.0.attn_q.weight", "token_embd.weight"],
        ["model.layers.0.self_attn.q_proj.weight"],
    ],
}  # fmt: skip


@pytest.mark.parametrize(("kind", "names"), [(kind, names) for kind, lists in NAMES.items() for names in lists])
def test_what_is_told_by_names(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, names: list[str]) -> None:
    """inspect says it and succeeds; convert and generate say it and refuse."""
    path = sparse(tmp_path / "x.safetensors", dict.fromkeys(names, (8, 8)))
    assert facts_of(path, capsys)["is"] == kind
    for command in (["convert", str(path), "-o", str(tmp_path / "x.gguf")], ["generate", str(path), "-p", "a"]):
        assert main(command) == 2
        error = capsys.readouterr().err
        runs = kind == "a ControlNet" and command[0] == "convert"  # which it would, were it whole
        assert error.startswith(f"gguf-sd: {path} is {kind}" + ("" if runs else "; "))
        assert error.count("\n") == 1


@pytest.mark.parametrize(
    "shapes", [{"emb_params": (4, 768)}, {"clip_l": (2, 768), "clip_g": (2, 1280)}, {"<cat>": (768,)}]
)
def test_embeddings(tmp_path: Path, capsys: pytest.CaptureFixture[str], shapes: dict[str, tuple[int, ...]]) -> None:
    assert facts_of(sparse(tmp_path / "e.safetensors", shapes), capsys)["is"] == "a textual-inversion embedding"


def test_whole_models_are_nothing_else() -> None:
    from gguf_sd.config import SD15, SD15_INPAINT, SDXL

    assert [what_is(model_shapes(config)) for config in (SD15, SD15_INPAINT, SDXL)] == [None, None, None]
    strays = {"control_model.input_blocks.0.0.weight": (320, 4, 3, 3), "lora_te_x.lora_up.weight": (8, 8)}
    assert what_is(model_shapes(SD15) | strays) is None


def test_gguf_files_of_other_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    writer = gguf.GGUFWriter(tmp_path / "llm.gguf", "llama")
    writer.add_array("tokenizer.ggml.scores", [0.5] * 5000)
    writer.add_tensor("token_embd.weight", np.ones((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    facts = facts_of(tmp_path / "llm.gguf", capsys)
    assert (facts["is"], facts["format"]) == ("a checkpoint of a language model", "GGUF")
    assert facts["metadata"]["tokenizer.ggml.scores"] == [0.5] * 5000


def test_keys_of_a_gguf_stay(
    tiny_pipeline: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "m.gguf"
    assert main(["convert", str(tiny_pipeline()), "-o", str(path), "--quiet"]) == 0
    facts = facts_of(path, capsys)
    keys = "file bytes architecture layout type source parts config metadata tensors"
    assert list(facts) == keys.split()
    assert list(facts["tensors"][0]) == ["name", "type", "shape", "stored", "bytes"]


def test_a_file_cannot_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "\x1b]0;owned\x07\x1b[2J\u202e\r\nfile          forged"
    path = sparse(tmp_path / "x.safetensors", {f"lora_unet_{hostile}.alpha": (1,)}, {f"key{hostile}": hostile})
    assert main(["inspect", str(path), "--tensors"]) == 0
    shown = capsys.readouterr().out
    assert not set("\x1b\x07\u202e\r") & set(shown)
    assert "\nfile          forged" not in shown
    assert "\\x1b]0;owned\\x07" in shown


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is truncated or no safetensors file"),
        (b"\x02\0\0\0\0\0\0\0{}trailing", None),
        (b"\xff\xff\0\0\0\0\0\0{", "header claims 65535 bytes"),
        (b"\x04\0\0\0\0\0\0\0{]]]", "is no JSON"),
        (b"\x08\0\0\0\0\0\0\0" + b'{"a": 1}', "tensor a is described as 1"),
        (b"\x0a\0\0\0\0\0\0\0" + b'{"a": [1]}', r"tensor a is described as \[1\]"),
    ],
)
def test_damaged_files(tmp_path: Path, capsys: pytest.CaptureFixture[str], data: bytes, message: str | None) -> None:
    (tmp_path / "x.safetensors").write_bytes(data)
    assert main(["inspect", str(tmp_path / "x.safetensors")]) == (2 if message else 0)
    captured = capsys.readouterr()
    if message:
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        assert re.search(message, captured.err)


@pytest.mark.parametrize(
    "row",
    [
        {"dtype": "F16", "shape": [4], "data_offsets": [0, 4]},
        {"dtype": "F16", "shape": [-4], "data_offsets": [0, -8]},
        {"dtype": "F16", "shape": [1 << 60], "data_offsets": [0, 1 << 61]},
        {"dtype": "F16", "shape": [1] * 9, "data_offsets": [0, 2]},
        {"dtype": "F99", "shape": [1], "data_offsets": [0, 2]},
        {"dtype": "F16", "shape": 4, "data_offsets": [0, 8]},
        {"dtype": "F16", "shape": [True], "data_offsets": [0, 2]},
    ],
)
def test_impossible_tensors(tmp_path: Path, capsys: pytest.CaptureFixture[str], row: dict[str, Any]) -> None:
    data = json.dumps({"a": row}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(data).to_bytes(8, "little") + data + bytes(64))
    assert main(["inspect", str(tmp_path / "x.safetensors")]) == 2
    assert "tensor a" in capsys.readouterr().err


def test_no_weight_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("root:x:0:0")
    assert main(["inspect", str(tmp_path / "notes.txt")]) == 2
    assert "notes.txt is no weight file: it starts with b'root'; inspect reads .gguf" in capsys.readouterr().err


def test_a_folder_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path)]) == 2
    assert "is no diffusers folder: it has no model_index.json" in capsys.readouterr().err
    save_file({"x.y": torch.ones(2)}, tmp_path / "a.safetensors")
    facts = facts_of(tmp_path, capsys)
    assert facts["is"] == "no model that gguf-sd knows"
