"""GGUF files made of GGUF files: what is copied, what is decoded, what is refused; values by gguf-py."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import save_file

from gguf_sd.checkpoint.tensor_names import UNET
from gguf_sd.cli.main import main
from gguf_sd.errors import GgufSdError
from gguf_sd.pipeline import Pipeline
from gguf_sd_convert.convert import ConvertOptions, convert
from gguf_sd_convert.pack import PackOptions, PartPaths, pack
from gguf_sd_convert.writer import GGUFSink
from tests.checkpoint.test_k_quants import random_blocks
from tests.convert.conftest import Written, ldm_state, read
from tests.convert.test_convert import CONV, LINEAR, relative

Make = Callable[..., Path]
CLIP = "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight"
VAE_CONV = "first_stage_model.decoder.conv_in.weight"


@pytest.fixture(scope="module")
def made(tiny_pipeline: Make, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """A function from a type and a layout to the tiny pipeline as such a file."""
    folder = tmp_path_factory.mktemp("sources")

    def make(qtype: str, layout: str) -> Path:
        path = folder / f"{qtype}-{layout}.gguf"
        if not path.exists():
            convert(tiny_pipeline(), path, ConvertOptions(type=qtype, layout=layout))
        return path

    return make


def cli(source: Path, target: Path, *options: str) -> Written:
    assert main(["convert", str(source), "-o", str(target), "--force", "--quiet", *options]) == 0
    return read(target)


def refused(capsys: pytest.CaptureFixture[str], source: Path, target: Path, *options: str) -> str:
    capsys.readouterr()
    assert main(["convert", str(source), "-o", str(target), "--quiet", *options]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert not target.exists()
    return error


def same_tensors(a: Written, b: Written) -> bool:
    equal = a.types == b.types and a.shapes == b.shapes
    return equal and all(np.array_equal(a.data[name], b.data[name]) for name in b.data)


@pytest.mark.parametrize(("qtype", "layout"), [("q4_0", "native"), ("q8_0", "comfy"), ("q5_1", "linear")])
def test_from_f16_as_from_the_checkpoint(
    made: Any, tiny_pipeline: Make, tmp_path: Path, qtype: str, layout: str
) -> None:
    """Byte for byte what a checkpoint of the same float16 values gives; only the source is another."""
    folder = tiny_pipeline()
    state = {n: t.half() if t.dim() > 1 else t for n, t in ldm_state(folder).items()}
    save_file(state, tmp_path / "m.safetensors")
    options = ["--type", qtype, "--layout", layout]
    more = ["--config", str(folder), "--tokenizer", str(folder / "tokenizer")]
    direct = cli(tmp_path / "m.safetensors", tmp_path / "a.gguf", *options, *more)
    written = cli(made("f16", "native"), tmp_path / "b.gguf", *options)
    assert same_tensors(written, direct)
    differ = {key for key, value in written.metadata.items() if direct.metadata.get(key) != value}
    assert differ == {"general.name", "gguf_sd.source.name", "gguf_sd.source.sha256"}
    original = read(made("f16", "native")).metadata
    for key in ("gguf_sd.source.name", "gguf_sd.source.sha256"):
        assert written.metadata[key] == original[key], "where it came from in the first place"


SAME = [("q4_0", "native"), ("q4_1", "comfy"), ("q5_0", "linear"), ("bf16", "comfy")]


@pytest.mark.parametrize(("qtype", "layout"), SAME)
def test_the_same_is_copied(made: Any, tmp_path: Path, qtype: str, layout: str) -> None:
    source = read(made(qtype, layout))
    for options in ([], ["--type", qtype, "--layout", layout]):
        written = cli(made(qtype, layout), tmp_path / "x.gguf", *options)
        assert same_tensors(written, source)
        assert {**written.metadata, "general.name": ""} == {**source.metadata, "general.name": ""}


@pytest.mark.parametrize("layout", ["native", "comfy"])
def test_to_the_linear_layout(made: Any, tmp_path: Path, layout: str) -> None:
    """Linears keep their blocks, convolutions become the float16 that they decode to."""
    source, written = read(made("q4_0", layout)), cli(made("q4_0", layout), tmp_path / "x.gguf", "--layout", "linear")
    direct = read(made("q4_0", "linear"))
    assert (written.types, written.shapes) == (direct.types, direct.shapes)
    assert np.array_equal(written.data[LINEAR], source.data[LINEAR])
    flat, (out, channels, kh, kw) = source.values(CONV), written.shapes[CONV]
    taps = flat.reshape(out, kh, kw, channels).transpose(0, 3, 1, 2) if layout == "native" else flat.reshape(out, -1)
    assert np.array_equal(written.values(CONV).ravel(), taps.astype(np.float16).astype(np.float32).ravel())
    assert not any("shape" in key for key in written.metadata)
    assert (written.metadata["general.architecture"], written.metadata["gguf_sd.type"]) == ("sd1", "q4_0")


@pytest.mark.parametrize(("source", "target"), [("native", "comfy"), ("comfy", "native")])
def test_blocks_stay_in_their_order(
    made: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str, target: str
) -> None:
    for qtype in ("q4_0", "q8_0"):
        options = ["--layout", target]
        error = refused(capsys, made(qtype, source), tmp_path / "x.gguf", *options)
        assert "values of one tap of a convolution, in comfy's values across taps, so those of" in error
        assert f"cannot be brought into the {target} layout; --allow-requantize decodes them" in error
        assert refused(capsys, made(qtype, source), tmp_path / "x.gguf", *options, "--type", qtype) == error
        written = cli(made(qtype, source), tmp_path / "y.gguf", *options, "--allow-requantize")
        direct = read(made(qtype, target))
        assert (written.types, written.shapes) == (direct.types, direct.shapes)
        assert np.array_equal(written.data[LINEAR], direct.data[LINEAR]), "what need not be decoded is copied"
        assert relative(written.values(CONV), direct.values(CONV)) < (0.15 if qtype == "q4_0" else 0.015)
    cli(made("q8_0", source), tmp_path / "z.gguf", *options, "--type", "q4_0")  # which is decoded anyway


def test_blocks_of_blocks_are_asked_for(made: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(capsys, made("q4_1", "native"), tmp_path / "x.gguf", "--type", "q4_0")
    assert f"lies in Q4_1 already (tensor {UNET}" in error
    assert "and Q4_0 would be made of that; --allow-requantize" in error
    written = cli(made("q4_1", "native"), tmp_path / "y.gguf", "--type", "q4_0", "--allow-requantize")
    direct = read(made("q4_0", "native"))
    assert written.types == direct.types
    assert relative(written.values(LINEAR), direct.values(LINEAR)) < 0.15
    written = cli(made("q4_1", "native"), tmp_path / "y.gguf", "--type", "f16")
    assert written.types[LINEAR] == "F16"
    assert np.array_equal(written.values(LINEAR), read(made("q4_1", "native")).values(LINEAR).astype(np.float16))


def test_the_unet_alone(made: Any, tiny_pipeline: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Copied; in ComfyUI-GGUF's layout, by its rules: an architecture that it knows, and shapes as arrays of INT32."""
    whole, target = read(made("q4_0", "comfy")), tmp_path / "u.gguf"
    unet = cli(made("q4_0", "comfy"), target, "--unet-only")
    assert unet.types == {name: kind for name, kind in whole.types.items() if name.startswith(UNET)}
    assert all(np.array_equal(unet.data[name], whole.data[name]) for name in unet.data)
    assert unet.metadata["general.architecture"] == "sd1"
    fields = gguf.GGUFReader(target).fields
    shapes = [field for key, field in fields.items() if key.startswith("comfy.gguf.orig_shape.")]
    assert len(shapes) > 20
    assert {tuple(field.types) for field in shapes} == {(gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.INT32)}
    assert "tokenizer.huggingface.json" not in fields
    direct = cli(tiny_pipeline(), tmp_path / "d.gguf", "--unet-only", "--type", "q4_0")
    assert same_tensors(unet, direct)
    assert unet.metadata["gguf_sd.config"] == direct.metadata["gguf_sd.config"]
    error = refused(capsys, target, tmp_path / "x.gguf", "--type", "q4_0")
    assert "holds a UNet alone; convert its UNet with --unet-only, or complete it by `gguf-sd pack` first" in error
    again = cli(cli_unet(tiny_pipeline(), tmp_path / "f16.gguf"), tmp_path / "e.gguf", "--unet-only", "--type", "q4_0")
    assert again.types == direct.types


def cli_unet(source: Path, target: Path) -> Path:
    cli(source, target, "--unet-only", "--type", "f16")
    return target


def foreign(path: Path, folder: Path, kinds: dict[str, Kind]) -> Written:
    """A file as stable-diffusion.cpp writes one: no metadata, its prefixes, norms quantised too; ``kinds``: types by
    name, of what is not F16 or F32."""
    writer = gguf.GGUFWriter(path, "unused")
    rng = np.random.default_rng(1)
    for name, tensor in ldm_state(folder).items():
        values = tensor.float().numpy()
        kind = kinds.get(name)
        new = name.replace(UNET, "unet.").replace("first_stage_model.", "vae.")
        if kind is None:
            writer.add_tensor(new, values.astype(np.float16) if values.ndim > 1 else values)
        elif kind in (Kind.Q6_K, Kind.IQ4_XS):
            writer.add_tensor(new, random_blocks(kind.name, len(values), values.shape[1], rng), raw_dtype=kind)
        else:
            writer.add_tensor(new, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.kv_data[0].clear()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read(path)


@pytest.fixture
def wide(tiny_pipeline: Make) -> Path:
    """Wide enough for K-quants."""
    return tiny_pipeline(unet={"block_out_channels": (32, 256), "cross_attention_dim": 32})


K_LINEAR = UNET + "middle_block.1.transformer_blocks.0.attn1.to_q.weight"
NORM = UNET + "middle_block.0.in_layers.0.weight"


def test_other_tools_files(wide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Norms become F32, text encoders keep their blocks, K-quants are copied, or decoded where that is asked for."""
    kinds = {K_LINEAR: Kind.Q6_K, NORM: Kind.Q4_0, CLIP: Kind.Q4_0}
    source = foreign(tmp_path / "other.gguf", wide, kinds)
    more = ["--config", str(wide), "--tokenizer", str(wide / "tokenizer")]
    path, target = tmp_path / "other.gguf", tmp_path / "x.gguf"
    written = cli(path, target, *more)
    assert {name: written.types[name] for name in kinds} == {K_LINEAR: "Q6_K", NORM: "F32", CLIP: "Q4_0"}
    assert written.metadata["gguf_sd.layout"] == "linear", "as it lies"
    for ours, theirs in ((K_LINEAR, K_LINEAR.replace(UNET, "unet.")), (CLIP, CLIP)):
        assert np.array_equal(written.data[ours], source.data[theirs])
    assert np.array_equal(written.values(NORM), source.values(NORM.replace(UNET, "unet.")))
    assert "lies in Q6_K already" in refused(capsys, path, tmp_path / "z.gguf", *more, "--type", "q4_0")
    written = cli(path, target, *more, "--type", "q4_0", "--allow-requantize", "--layout", "native")
    assert (written.types[K_LINEAR], written.types[CLIP]) == ("Q4_0", "Q4_0")
    decoded = source.values(K_LINEAR.replace(UNET, "unet."))
    assert relative(written.values(K_LINEAR), decoded) < 0.1
    settings = {"steps": 1, "width": 32, "height": 32, "seed": 1}
    assert Pipeline.load(target, "cpu", "float32")("a cat", **settings)[0].size == (32, 32)


def test_second_text_encoders_with_transformers_names(tiny_pipeline: Make, tmp_path: Path) -> None:
    """As packing leaves them, converting brings them into the original order; the picture stays."""
    folder = tiny_pipeline(xl=True, vae={"norm_num_groups": 32})
    convert(folder, tmp_path / "u.gguf", ConvertOptions(type="q8_0", unet_only=True))
    given = PartPaths(folder / "text_encoder", folder / "text_encoder_2", folder / "vae")
    pack(tmp_path / "u.gguf", given, tmp_path / "w.gguf", PackOptions(folder / "tokenizer"))
    packed, written = read(tmp_path / "w.gguf"), cli(tmp_path / "w.gguf", tmp_path / "c.gguf")
    assert any(".1.transformer.text_model." in name for name in packed.types)
    assert any(".1.model.transformer.resblocks." in name for name in written.types)
    settings = {"steps": 1, "width": 32, "height": 32, "seed": 1}
    pictures = [
        Pipeline.load(tmp_path / name, "cpu", "float32")("a cat", **settings)[0] for name in ("w.gguf", "c.gguf")
    ]
    packed_one, converted = (np.asarray(picture, dtype=int) for picture in pictures)
    assert np.abs(packed_one - converted).max() <= 1, "products of one matrix or of three may round otherwise"


def test_loras_go_into_plain_weights(made: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Into blocks only where that is asked for; the file counts those that were merged before."""
    down, up = torch.randn(2, 32) * 0.1, torch.randn(32, 2)
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, tmp_path / "ink.safetensors")
    lora = ["--lora", str(tmp_path / "ink.safetensors")]
    error = refused(capsys, made("q4_0", "native"), tmp_path / "x.gguf", *lora)
    assert f"a LoRA would change {LINEAR}, which lies there as Q4_0 blocks; --allow-requantize" in error
    before = read(made("f16", "native"))
    written = cli(made("f16", "native"), tmp_path / "a.gguf", *lora)
    wanted = before.values(LINEAR) + (up @ down).numpy()
    assert relative(written.values(LINEAR), wanted) < 1e-3
    again = cli(tmp_path / "a.gguf", tmp_path / "b.gguf", *lora, "--type", "q8_0")
    assert len(json.loads(again.metadata["gguf_sd.loras"])) == 2
    assert again.metadata["gguf_sd.source.sha256"] != before.metadata["gguf_sd.source.sha256"]
    written = cli(made("q4_0", "native"), tmp_path / "c.gguf", *lora, "--allow-requantize")
    assert relative(written.values(LINEAR), wanted) < 0.2
    written = cli(made("q8_0", "native"), tmp_path / "d.gguf", *lora)
    assert relative(written.values(LINEAR), wanted) < 0.02, "Q8_0 is as good as the original"


def test_what_cannot_be(made: Any, tiny_pipeline: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = made("f16", "native"), tmp_path / "x.gguf"
    assert "--ema is for checkpoints" in refused(capsys, source, target, "--ema")
    assert "is no GGUF file, which --type same is for" in refused(capsys, tiny_pipeline(), target, "--type", "same")
    assert "no type 'q9'; choose from" in refused(capsys, source, target, "--type", "q9")
    data = source.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(data[: len(data) // 2])
    assert "is truncated" in refused(capsys, tmp_path / "cut.gguf", target, "--type", "q4_0")


def test_copied_blocks_are_looked_at(made: Any, tmp_path: Path) -> None:
    reader = gguf.GGUFReader(made("q4_0", "native"))
    (tensor,) = (t for t in reader.tensors if t.name == LINEAR)
    data = bytearray(made("q4_0", "native").read_bytes())
    data[tensor.data_offset : tensor.data_offset + 2] = np.float16(np.nan).tobytes()
    (tmp_path / "nan.gguf").write_bytes(data)
    with pytest.raises(GgufSdError, match=f"tensor {LINEAR} holds NaN"):
        convert(tmp_path / "nan.gguf", tmp_path / "x.gguf", ConvertOptions(type="same"))
    assert not (tmp_path / "x.gguf").exists()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_interrupted_pack_leaves_nothing(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def failing(self: GGUFSink, name: str, data: torch.Tensor) -> None:
        raise error("half way")

    monkeypatch.setattr(GGUFSink, "write", failing)
    with pytest.raises(error, match="half way"):
        pack(made("f16", "native"), PartPaths(), tmp_path / "x.gguf")
    assert list(tmp_path.iterdir()) == []


def test_reports(made: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = convert(made("q4_0", "native"), tmp_path / "x.gguf", ConvertOptions(type="same", layout="auto"))
    assert (report.type, report.layout, report.nbytes) == ("q4_0", "native", (tmp_path / "x.gguf").stat().st_size)
    assert json.dumps(asdict(report))
    capsys.readouterr()
    assert main(["convert", str(made("q4_0", "native")), "-o", str(tmp_path / "y.gguf")]) == 0
    assert "q4_0" in capsys.readouterr().out.lower()
