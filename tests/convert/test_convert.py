"""Whole conversions of tiny pipelines, read back with gguf-py."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gguf_sd.config import ModelConfig
from gguf_sd.errors import GgufSdError
from gguf_sd_convert.convert import ConvertOptions, convert
from gguf_sd_convert.quantize.quantizers import quantize

Make = Callable[..., Any]
CONV = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"
SKIP = "model.diffusion_model.output_blocks.0.0.skip_connection.weight"
LINEAR = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
PROTECTED = ("input_blocks.0.0.", "out.2.", "time_embed.")
TOLERANCE = {"Q8_0": 0.01, "Q5_1": 0.06, "Q5_0": 0.06, "Q4_1": 0.11, "Q4_0": 0.11, "BF16": 4e-3, "F16": 5e-4, "F32": 0}


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / (np.linalg.norm(b) + 1e-12))


def in_model_order(values: np.ndarray, shape: tuple[int, ...], layout: str) -> np.ndarray:
    """A stored tensor in the model's shape."""
    if values.shape == shape or len(shape) != 4:
        return values.reshape(shape)
    if layout == "native":
        out, channels, kh, kw = shape
        return values.reshape(out, kh, kw, channels).transpose(0, 3, 1, 2)
    return values.reshape(shape)


@pytest.mark.parametrize("layout", ["native", "comfy", "linear"])
@pytest.mark.parametrize("qtype", ["q4_0", "q8_0"])
def test_values(tiny_pipeline: Make, single_file: Make, converted: Make, layout: str, qtype: str) -> None:
    """Every tensor is there, of the type the policy says, and decodes to the source's values."""
    state = single_file().state
    written = converted(tiny_pipeline(), type=qtype, layout=layout)
    assert written.types.keys() == state.keys()
    quantised = 0
    for name, tensor in state.items():
        shape, kind = tuple(tensor.shape), written.types[name]
        if tensor.dim() == 1:
            expected = "F32"
        elif not name.startswith("model.diffusion_model.") or any(p in name for p in PROTECTED):
            expected = "F16"
        else:
            expected = "F16" if layout == "linear" and tensor.dim() == 4 else qtype.upper()
        assert kind == expected, name
        quantised += kind == qtype.upper()
        stored = shape if kind != qtype.upper() else (shape[0], math.prod(shape[1:]))
        assert written.shapes[name] == stored
        values = in_model_order(written.values(name), shape, layout)
        assert relative(values, tensor.numpy()) <= TOLERANCE[kind], name
    assert quantised > 50


@pytest.mark.parametrize("qtype", ["f16", "bf16", "q5_0", "q5_1", "q4_1"])
def test_types(tiny_pipeline: Make, single_file: Make, converted: Make, qtype: str) -> None:
    written = converted(tiny_pipeline(), type=qtype)
    for name in (CONV, SKIP, LINEAR):
        tensor = single_file().state[name]
        assert written.types[name] == qtype.upper()
        values = in_model_order(written.values(name), tuple(tensor.shape), "native")
        assert relative(values, tensor.numpy()) <= TOLERANCE[qtype.upper()]
        if qtype in ("f16", "bf16"):
            assert written.shapes[name] == tuple(tensor.shape)
    assert written.metadata["general.file_type"] == gguf.LlamaFileType[f"MOSTLY_{qtype.upper()}"]


@pytest.mark.parametrize("layout", ["native", "comfy", "linear"])
def test_metadata(tiny_pipeline: Make, single_file: Make, converted: Make, layout: str) -> None:
    folder = tiny_pipeline()
    written = converted(folder, type="q4_0", layout=layout)
    metadata, state = written.metadata, single_file().state
    assert metadata["general.architecture"] == ("gguf_sd" if layout == "native" else "sd1")
    assert metadata["general.quantization_version"] == 2
    assert metadata["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_0
    assert metadata["gguf_sd.format_version"] == 1
    assert (metadata["gguf_sd.layout"], metadata["gguf_sd.type"]) == (layout, "q4_0")
    assert metadata["gguf_sd.source.name"] == folder.name
    files = sorted([*folder.glob("*/diffusion_pytorch_model.safetensors"), folder / "text_encoder/model.safetensors"])
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    assert metadata["gguf_sd.source.sha256"] == digest
    config = ModelConfig.from_dict(json.loads(metadata["gguf_sd.config"]))
    assert config.unet.block_out_channels == (32, 64)
    assert config.unet.num_heads == (4, 4)
    flat = {n: list(t.shape) for n, t in state.items() if written.types[n] == "Q4_0" and t.dim() == 4}
    if layout == "native":
        assert json.loads(metadata["gguf_sd.shapes"]) == flat
        assert not any(key.startswith("comfy.") for key in metadata)
    else:
        found = {k.removeprefix("comfy.gguf.orig_shape."): v for k, v in metadata.items() if "orig_shape" in k}
        assert found == (flat if layout == "comfy" else {})
        assert "gguf_sd.shapes" not in metadata


def test_comfy_shapes_are_int32(tiny_pipeline: Make, tmp_path: Path) -> None:
    convert(tiny_pipeline(), tmp_path / "c.gguf", ConvertOptions(type="q4_0", layout="comfy"))
    field = gguf.GGUFReader(tmp_path / "c.gguf").fields["comfy.gguf.orig_shape." + CONV]
    assert field.types == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.INT32]


def test_native_rows_are_tap_major(tiny_pipeline: Make, single_file: Make, converted: Make) -> None:
    weight = single_file().state[CONV]
    written = converted(tiny_pipeline(), type="q8_0")
    flat = weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1)
    assert np.array_equal(written.data[CONV], quantize(flat, "Q8_0").numpy())
    written = converted(tiny_pipeline(), type="q8_0", layout="comfy")
    assert np.array_equal(written.data[CONV], quantize(weight.flatten(1), "Q8_0").numpy())


VARIANTS = [
    {},
    {"unet": {"in_channels": 9, "layers_per_block": 1}},
    {"unet": {"use_linear_projection": True, "block_out_channels": (32, 64)}, "vae": {"layers_per_block": 2}},
    {
        "unet": {
            "block_out_channels": (32, 32, 64),
            "attention_head_dim": (2, 4, 8),
            "transformer_layers_per_block": (1, 1, 2),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        }
    },
]


@pytest.mark.parametrize("fields", VARIANTS)
def test_single_file_and_folder_agree(
    tiny_pipeline: Make, single_file: Make, converted: Make, tmp_path: Path, fields: dict[str, Any]
) -> None:
    """The same weights as a diffusers folder, .safetensors and .ckpt give the same tensors, byte for byte."""
    expected = converted(tiny_pipeline(**fields), type="q4_0")
    original = single_file(**fields)
    for suffix in (".safetensors", ".ckpt"):
        written = converted(original.save(tmp_path / f"model{suffix}"), type="q4_0", **original.options)
        assert list(written.types.items()) == list(expected.types.items())
        assert written.shapes == expected.shapes
        assert all(np.array_equal(written.data[name], expected.data[name]) for name in expected.data)
        assert written.metadata["gguf_sd.config"] == expected.metadata["gguf_sd.config"]
        digest = hashlib.sha256((tmp_path / f"model{suffix}").read_bytes()).hexdigest()
        assert written.metadata["gguf_sd.source.sha256"] == digest


def test_matrices_for_1x1_convolutions(single_file: Make, converted: Make, tmp_path: Path) -> None:
    """Other tools save them as [out, in]; the file gets the original shape."""
    original = single_file()
    expected = converted(original.save(tmp_path / "a.safetensors"), **original.options)
    original.state = {n: t[:, :, 0, 0].contiguous() if t.shape[2:] == (1, 1) else t for n, t in original.state.items()}
    written = converted(original.save(tmp_path / "b.safetensors"), **original.options)
    assert written.shapes == expected.shapes
    assert all(np.array_equal(written.data[name], expected.data[name]) for name in expected.data)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_source_dtypes(single_file: Make, converted: Make, tmp_path: Path, dtype: torch.dtype) -> None:
    original = single_file()
    original.state = {name: tensor.to(dtype) for name, tensor in original.state.items()}
    written = converted(original.save(tmp_path / "model.safetensors"), type="q4_0", **original.options)
    weight = original.state[LINEAR]
    assert np.array_equal(written.data[LINEAR], quantize(weight.float(), "Q4_0").numpy())
    for name, tensor in original.state.items():
        if written.types[name] in ("F16", "F32"):
            exact = tensor.half().float() if written.types[name] == "F16" else tensor.float()
            assert np.array_equal(written.values(name), exact.numpy()), name


def test_sharded_folder(tiny_pipeline: Make, converted: Make, tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    expected = converted(tiny_pipeline(), type="q4_0")
    folder = tmp_path / "sharded"
    shutil.copytree(tiny_pipeline(), folder)
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    shutil.rmtree(folder / "unet")
    unet.save_pretrained(folder / "unet", max_shard_size="1MB")
    assert len(list((folder / "unet").glob("*.safetensors"))) > 1
    written = converted(folder, type="q4_0")
    assert list(written.types) == list(expected.types)
    assert all(np.array_equal(written.data[name], expected.data[name]) for name in expected.data)


def test_fp16_variant_of_a_folder(tiny_pipeline: Make, converted: Make, tmp_path: Path) -> None:
    folder = tmp_path / "fp16"
    shutil.copytree(tiny_pipeline(), folder)
    for path in [*folder.glob("*/diffusion_pytorch_model.safetensors"), folder / "text_encoder/model.safetensors"]:
        save_file({n: t.half() for n, t in load_file(path).items()}, path.with_suffix(".fp16.safetensors"))
        path.unlink()
    assert converted(folder).types[LINEAR] == "Q8_0"


def test_transformers_4_names(tiny_pipeline: Make, converted: Make, tmp_path: Path) -> None:
    """Its text encoders have another level of names and save their position ids."""
    folder = tmp_path / "old"
    shutil.copytree(tiny_pipeline(), folder)
    path = folder / "text_encoder" / "model.safetensors"
    state = {"text_model." + n.removeprefix("text_model."): t for n, t in load_file(path).items()}
    save_file(state | {"text_model.embeddings.position_ids": torch.arange(77)[None]}, path)
    expected, written = converted(tiny_pipeline()), converted(folder)
    assert written.types == expected.types
    assert all(np.array_equal(written.data[name], expected.data[name]) for name in expected.data)


def test_ema(single_file: Make, tmp_path: Path) -> None:
    original = single_file()
    generator = torch.Generator().manual_seed(3)
    averaged = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): torch.randn(t.shape, generator=generator)
        for name, t in original.state.items()
        if name.startswith("model.diffusion_model.")
    }
    extra = {"model_ema.decay": torch.tensor(0.9), "model_ema.num_updates": torch.tensor(7)}
    path = original.save(tmp_path / "full.safetensors", **averaged, **extra)
    for ema in (False, True):
        target = tmp_path / f"{ema}.gguf"
        report = convert(path, target, ConvertOptions(type="f16", ema=ema, **original.options))
        assert any("EMA" in note for note in report.notes)
        reader = {t.name: np.array(t.data) for t in gguf.GGUFReader(target).tensors}
        written_name = "model_ema." + LINEAR.removeprefix("model.").replace(".", "")
        expected = averaged[written_name] if ema else original.state[LINEAR]
        assert np.array_equal(reader[LINEAR], expected.half().numpy())
        text = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
        assert np.array_equal(reader[text], original.state[text].half().numpy())


def test_ema_of_a_file_without(single_file: Make, tmp_path: Path) -> None:
    original = single_file()
    path = original.save(tmp_path / "pruned.safetensors")
    with pytest.raises(GgufSdError, match="no EMA weights"):
        convert(path, tmp_path / "x.gguf", ConvertOptions(ema=True, **original.options))


def test_values_beyond_f16_stay_f32(single_file: Make, converted: Make, tmp_path: Path) -> None:
    original = single_file()
    vae = "first_stage_model.decoder.conv_in.weight"
    for name in (CONV, LINEAR, vae):
        original.state[name] = original.state[name].clone()
        original.state[name].view(-1)[7] = 1e5
    written = converted(original.save(tmp_path / "m.safetensors"), type="q4_0", **original.options)
    for name in (CONV, LINEAR, vae):
        assert written.types[name] == "F32"
        assert np.array_equal(written.values(name), original.state[name].numpy())
    assert CONV not in json.loads(written.metadata["gguf_sd.shapes"])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", [CONV, "first_stage_model.encoder.conv_in.bias"])
def test_nan_and_infinity_are_refused(
    single_file: Make, tmp_path: Path, value: float, dtype: torch.dtype, name: str
) -> None:
    original = single_file()
    original.state = {n: t.to(dtype) for n, t in original.state.items()}
    original.state[name] = original.state[name].clone()
    original.state[name].view(-1)[-1] = value
    path = original.save(tmp_path / "m.safetensors")
    with pytest.raises(GgufSdError, match=name.replace(".", r"\.")):
        convert(path, tmp_path / "x.gguf", ConvertOptions(type="q4_0", **original.options))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.safetensors"]


def test_rows_that_blocks_do_not_fill(tiny_pipeline: Make, converted: Make, tmp_path: Path) -> None:
    fields = {"unet": {"block_out_channels": (48, 64), "norm_num_groups": 8}}
    report = convert(tiny_pipeline(**fields), tmp_path / "x.gguf", ConvertOptions(type="q4_0"))
    count, nbytes = next(v for k, v in report.kept.items() if "do not fill" in k)
    assert count > 10
    assert nbytes > 0
    written = converted(tiny_pipeline(**fields), type="q4_0")
    assert (written.types[CONV], written.shapes[CONV]) == ("F16", (48, 48, 3, 3))


def test_report(tiny_pipeline: Make, tmp_path: Path) -> None:
    """Its sums are the file's."""
    target = tmp_path / "x.gguf"
    report = convert(tiny_pipeline(), target, ConvertOptions(type="q4_0"))
    assert report.nbytes == target.stat().st_size
    tensors = gguf.GGUFReader(target).tensors
    for kind, (count, nbytes) in report.types.items():
        mine = [t for t in tensors if t.tensor_type.name == kind]
        assert (count, nbytes) == (len(mine), sum(int(t.n_bytes) for t in mine))
    assert sum(count for count, _ in report.kept.values()) == len(tensors) - report.types["Q4_0"][0]
    f16 = convert(tiny_pipeline(), tmp_path / "f16.gguf", ConvertOptions(type="f16"))
    assert abs(report.f16_nbytes - f16.nbytes) < 0.01 * f16.nbytes
    assert report.nbytes < 0.75 * f16.nbytes
    assert json.dumps(asdict(report))


def test_progress_reaches_its_end(tiny_pipeline: Make, tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    convert(tiny_pipeline(), tmp_path / "x.gguf", ConvertOptions(), lambda *state: seen.append(state))
    assert {doing for _, _, doing in seen} == {"checking", "converting"}
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    assert seen[-1][0] == seen[-1][1] > 0


def test_threads_do_not_show(tiny_pipeline: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gguf_sd_convert import workers

    before = torch.get_num_threads()
    for threads, in_flight in ((1, 1), (5, 1 << 30)):
        monkeypatch.setattr(workers, "IN_FLIGHT", in_flight)
        convert(tiny_pipeline(), tmp_path / f"{threads}.gguf", ConvertOptions(type="q4_0", threads=threads))
    assert (tmp_path / "1.gguf").read_bytes() == (tmp_path / "5.gguf").read_bytes()
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("fields", [{}, {"unet": {"use_linear_projection": True}}])
def test_diffusers_loads_the_linear_layout(tiny_pipeline: Make, tmp_path: Path, fields: dict[str, Any]) -> None:
    pytest.importorskip("accelerate", reason="diffusers loads GGUF files through it")
    from diffusers import GGUFQuantizationConfig, UNet2DConditionModel

    folder = tiny_pipeline(**fields)
    convert(folder, tmp_path / "linear.gguf", ConvertOptions(type="q8_0", layout="linear"))
    loaded = UNet2DConditionModel.from_single_file(
        str(tmp_path / "linear.gguf"),
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
        config=str(folder),
        subfolder="unet",
        torch_dtype=torch.float32,
    )
    original = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    generator = torch.Generator().manual_seed(0)
    inputs = (
        torch.randn(1, 4, 16, 16, generator=generator),
        torch.tensor([5]),
        torch.randn(1, 7, 32, generator=generator),
    )
    with torch.no_grad():
        ours, theirs = loaded(*inputs).sample, original(*inputs).sample
    assert relative(ours.numpy(), theirs.numpy()) < 0.03
