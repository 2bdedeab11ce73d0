"""Sources that cannot be converted: one GgufSdError that says why, and nothing written."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from gguf_sd.checkpoint.inventory import expected_tensors
from gguf_sd.config import SD15, SDXL
from gguf_sd.errors import GgufSdError
from gguf_sd_convert.convert import ConvertOptions, convert
from gguf_sd_convert.sources.checkpoints import open_checkpoint
from gguf_sd_convert.sources.source import open_source

Make = Callable[..., Any]
CONV = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"


def refused(source: Path, match: str, **options: Any) -> None:
    target = source.parent / "refused.gguf"
    before = sorted(source.parent.iterdir())
    with pytest.raises(GgufSdError, match=match):
        convert(source, target, ConvertOptions(**options))
    assert sorted(source.parent.iterdir()) == before


def header(rows: dict[str, Any], data: bytes = b"") -> bytes:
    text = json.dumps(rows).encode()
    return struct.pack("<Q", len(text)) + text + data


def row(**changes: Any) -> dict[str, Any]:
    return {"x": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]} | changes}


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "no checkpoint|truncated"),
        (b"hello, this is no checkpoint at all", "no checkpoint"),
        (b"GGUF" + bytes(60), "has GGUF version 0"),
        (struct.pack("<Q", 1 << 40) + b"{}", "truncated"),
        (struct.pack("<Q", 20) + b'{"a": ', "truncated"),
        (struct.pack("<Q", 9) + b'{"a": {]}', "no JSON"),
        (struct.pack("<Q", 2) + b"[]", "no checkpoint|JSON object"),
        (header(row(), bytes(15)), "truncated: tensor x ends at"),
        (header(row(data_offsets=[0, 12]), bytes(16)), "data offsets 0 to 12"),
        (header(row(data_offsets=[-4, 12]), bytes(16)), "data offsets -4"),
        (header(row(shape=[1 << 62, 4]), bytes(16)), "data offsets"),
        (header(row(shape=[-2, -2]), bytes(16)), "data offsets"),
        (header(row(shape=[2.0, 2]), bytes(16)), "data offsets"),
        (header(row(dtype="F7"), bytes(16)), "too new"),
        (header({"x": 7}), "too new"),
        (header({"x": {"dtype": "F32"}}), "too new"),
        (header(row(), bytes(16)), "no Stable Diffusion UNet"),
        (b"PK\x03\x04" + bytes(100), "damaged"),
        (b"\x80\x02garbage", "damaged|something other"),
    ],
)
def test_damaged_files(tmp_path: Path, content: bytes, match: str) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(content)
    refused(path, match)


def test_header_of_nested_lists(tmp_path: Path) -> None:
    text = b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    refused(tmp_path / "m.safetensors", "no JSON")


def test_missing_file(tmp_path: Path) -> None:
    refused(tmp_path / "none.safetensors", "does not exist")


def test_truncated_safetensors(single_file: Make, tmp_path: Path) -> None:
    original = single_file()
    path = original.save(tmp_path / "m.safetensors")
    path.write_bytes(path.read_bytes()[:-1000])
    refused(path, "truncated", **original.options)


@pytest.mark.parametrize("keep", [100, 5000, -1000])
def test_truncated_ckpt(single_file: Make, tmp_path: Path, keep: int) -> None:
    original = single_file()
    path = original.save(tmp_path / "m.ckpt")
    path.write_bytes(path.read_bytes()[:keep])
    refused(path, "damaged", **original.options)


class Hostile:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return eval, (f"open({str(self.path)!r}, 'w')",)


def test_pickled_code_is_refused(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    torch.save({"state_dict": {"x": torch.zeros(2)}, "extra": Hostile(trace)}, tmp_path / "zip.ckpt")
    (tmp_path / "plain.ckpt").write_bytes(pickle.dumps(Hostile(trace), protocol=2))
    refused(tmp_path / "zip.ckpt", r"Python code \(.*eval\) and is refused")
    refused(tmp_path / "plain.ckpt", "refused|damaged")
    assert not trace.exists()


def test_lightning_leftovers_are_harmless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Original .ckpt files of Stable Diffusion hold a callback's class and its state."""
    import sys
    import types

    name = "pytorch_lightning.callbacks.model_checkpoint"
    module = types.ModuleType(name)
    checkpoint_class = type("ModelCheckpoint", (), {"__module__": name})
    module.ModelCheckpoint = checkpoint_class  # type: ignore[attr-defined]
    for part in ("pytorch_lightning", "pytorch_lightning.callbacks", name):
        monkeypatch.setitem(sys.modules, part, module)
    callbacks = {checkpoint_class: {"best": 0.5}, "instance": checkpoint_class()}
    torch.save({"state_dict": {"x": torch.ones(2)}, "callbacks": callbacks}, tmp_path / "m.ckpt")
    for part in ("pytorch_lightning", "pytorch_lightning.callbacks", name):
        monkeypatch.delitem(sys.modules, part)
    assert open_checkpoint(tmp_path / "m.ckpt").entries["x"].load().tolist() == [1, 1]


def test_legacy_ckpt(single_file: Make, converted: Make, tmp_path: Path) -> None:
    original = single_file()
    path = tmp_path / "old.ckpt"
    torch.save(original.state, path, _use_new_zipfile_serialization=False)
    assert converted(path, **original.options).types.keys() == original.state.keys()


def test_ckpt_of_a_list(tmp_path: Path) -> None:
    torch.save([torch.zeros(2)], tmp_path / "m.ckpt")
    refused(tmp_path / "m.ckpt", "no state dict but list")


def test_strided_and_shared_ckpt_tensors(tmp_path: Path) -> None:
    x = torch.arange(60.0).reshape(6, 10)
    torch.save({"t": x.t(), "part": x[2:4, 3:], "x": x}, tmp_path / "m.ckpt")
    entries = open_checkpoint(tmp_path / "m.ckpt").entries
    for _ in range(2):
        for name, expected in {"t": x.t(), "part": x[2:4, 3:], "x": x}.items():
            assert torch.equal(entries[name].load(), expected)
            assert entries[name].load().is_contiguous()


@pytest.mark.parametrize("name", [CONV, "first_stage_model.decoder.conv_out.bias"])
def test_missing_tensor(single_file: Make, tmp_path: Path, name: str) -> None:
    original = single_file()
    del original.state[name]
    refused(original.save(tmp_path / "m.safetensors"), f"lacks 1 of .* {name}", **original.options)


def test_unet_only(single_file: Make, tmp_path: Path) -> None:
    original = single_file()
    original.state = {n: t for n, t in original.state.items() if n.startswith("model.diff")}
    refused(original.save(tmp_path / "m.safetensors"), "a whole checkpoint .* is needed", **original.options)


@pytest.mark.parametrize("shape", [(32, 32, 9), (32, 32, 1, 1), (64, 32, 3, 3)])
def test_wrong_shape(single_file: Make, tmp_path: Path, shape: tuple[int, ...]) -> None:
    original = single_file()
    original.state[CONV] = torch.zeros(shape)
    refused(original.save(tmp_path / "m.safetensors"), f"tensor {CONV} has shape", **original.options)


def test_integer_weights(single_file: Make, tmp_path: Path) -> None:
    original = single_file()
    original.state[CONV] = original.state[CONV].to(torch.int8)
    refused(original.save(tmp_path / "m.safetensors"), "torch.int8", **original.options)


def test_unknown_tensors_are_left_out_and_named(single_file: Make, tmp_path: Path) -> None:
    original = single_file()
    original.state["lora_te_something"] = torch.zeros(3)
    original.state["alphas_cumprod"] = torch.zeros(1000)  # known, and not needed
    path = original.save(tmp_path / "m.safetensors")
    report = convert(path, tmp_path / "x.gguf", ConvertOptions(**original.options))
    assert report.notes == [f"{path} holds a tensor that does not belong and is left out: lora_te_something"]


def stub(tmp_path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    """A .safetensors file with these shapes, sparse, so that it takes no room."""
    rows, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + 2 * torch.Size(shape).numel()
        rows[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    path = tmp_path / "model.safetensors"
    with open(path, "wb") as file:
        file.write(header(rows))
        file.truncate(file.tell() + offset)
    return path


UNET = "model.diffusion_model."


@pytest.mark.parametrize(
    ("shapes", "match"),
    [
        (
            {
                UNET + "input_blocks.0.0.weight": (320, 4, 3, 3),
                UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024),
            },
            "Stable Diffusion 2",
        ),
        ({UNET + "double_blocks.0.img_attn.qkv.weight": (9, 9)}, "Flux"),
        ({UNET + "joint_blocks.0.x_block.attn.qkv.weight": (9, 9)}, "Stable Diffusion 3"),
        ({"model.embed_tokens.weight": (32, 9)}, "language model"),
        ({UNET + "input_blocks.0.0.weight": (64, 4, 3, 3)}, "unknown shape"),
        ({"fc.weight": (9, 9)}, "no Stable Diffusion UNet"),
    ],
)
def test_other_architectures(tmp_path: Path, shapes: dict[str, tuple[int, ...]], match: str) -> None:
    refused(stub(tmp_path, shapes), match)


@pytest.mark.parametrize("config", [SD15, SDXL])
def test_full_size_models_are_recognised(tmp_path: Path, config: Any) -> None:
    source = open_source(stub(tmp_path, expected_tensors(config)))
    assert source.config == config
    assert source.tensors.keys() == expected_tensors(config).keys()


def test_modelspec_turbo(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    shapes = expected_tensors(SDXL)
    stub(tmp_path, shapes)
    content = path.read_bytes() if path.stat().st_size < 1 else b""
    assert not content
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        rows = json.loads(file.read(length))
        size = path.stat().st_size
        file.seek(0)
        rows["__metadata__"] = {"modelspec.architecture": "stable-diffusion-xl-turbo-v1"}
        file.write(header(rows))
        file.truncate(size + 1000)
    source = open_source(path)
    assert (source.config.defaults.sampler, source.config.defaults.steps) == ("euler_a", 1)
    assert source.config.scheduler.timestep_spacing == "trailing"


@pytest.mark.parametrize("option", [{"type": "q3_k"}, {"type": "Q4_0.gguf"}, {"layout": "flat"}])
def test_unknown_options(tiny_pipeline: Make, tmp_path: Path, option: dict[str, str]) -> None:
    with pytest.raises(GgufSdError, match="choose from"):
        convert(tiny_pipeline(), tmp_path / "x.gguf", ConvertOptions(**option))


@pytest.mark.parametrize(
    ("missing", "match"),
    [
        ("model_index.json", "no model_index.json"),
        ("unet/config.json", "no whole diffusers folder"),
        ("vae", "no whole diffusers folder"),
        ("text_encoder/model.safetensors", "holds no model.safetensors"),
        ("scheduler", "no whole diffusers folder"),
    ],
)
def test_incomplete_folders(tiny_pipeline: Make, tmp_path: Path, missing: str, match: str) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(tiny_pipeline(), folder)
    path = folder / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    refused(folder, match)


def test_other_pipelines(edited_folder: Make, tmp_path: Path) -> None:
    folder = edited_folder("unet")
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": "FluxPipeline"}))
    refused(folder, "FluxPipeline")


def test_bad_shard_index(tiny_pipeline: Make, tmp_path: Path) -> None:
    folder = tmp_path / "sharded"
    shutil.copytree(tiny_pipeline(), folder)
    stem = folder / "unet" / "diffusion_pytorch_model.safetensors"
    stem.rename(folder / "unet" / "shard.safetensors")
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    for content, match in [
        ("{", "no JSON"),
        ('{"weight_map": 7}', "no index"),
        ('{"weight_map": {"a": "../shard.safetensors"}}', "outside"),
        ('{"weight_map": {"a": "shard.safetensors"}}', "does not hold it"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "cannot read"),
    ]:
        index.write_text(content)
        refused(folder, match)


def test_ema_of_a_folder(tiny_pipeline: Make) -> None:
    refused(tiny_pipeline(), "--ema is for single-file", ema=True)


def test_foreign_tensor_in_a_folder(tiny_pipeline: Make, tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    shutil.copytree(tiny_pipeline(), folder)
    save_file({"adapter.weight": torch.zeros(2)}, folder / "unet" / "diffusion_pytorch_model.safetensors")
    refused(folder, r"lacks \d+ of \d+ tensors, the first is model.diffusion_model.time_embed")
