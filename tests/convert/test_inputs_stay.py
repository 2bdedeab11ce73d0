"""A conversion never writes onto what it reads, and what a source says of itself is heard."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file

from gguf_sd.checkpoint.model_file import ModelFile
from gguf_sd.cli.main import main
from gguf_sd.errors import GgufSdError
from gguf_sd_convert.convert import ConvertOptions, convert
from gguf_sd_convert.prepare import source_config
from gguf_sd_convert.sources.source import open_source

Make = Callable[..., Any]


def digest(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("how", ["itself", "symlink", "hardlink", "dotted"])
def test_a_file_is_not_written_onto(single_file: Make, tmp_path: Path, how: str) -> None:
    original = single_file()
    path = original.save(tmp_path / "m.safetensors")
    target = tmp_path / "other.gguf"
    if how == "symlink":
        target.symlink_to(path)
    elif how == "hardlink":
        os.link(path, target)
    else:
        target = path if how == "itself" else tmp_path / ".." / tmp_path.name / path.name
    before = digest(tmp_path)
    with pytest.raises(GgufSdError, match="which is read; choose another output"):
        convert(path, target, ConvertOptions(force=True, **original.options))
    assert digest(tmp_path) == before


def test_files_of_a_folder_and_other_inputs_are_not_written_onto(
    tiny_pipeline: Make, single_file: Make, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_pipeline(), folder)
    before = digest(folder)
    link = tmp_path / "link.gguf"
    os.link(folder / "tokenizer" / "merges.txt", link)
    for target in (folder / "unet" / "config.json", folder / "model_index.json", link):
        with pytest.raises(GgufSdError, match="which is read"):
            convert(folder, target, ConvertOptions(force=True))
    path = single_file().save(tmp_path / "m.safetensors")
    for target in (folder / "vae" / "config.json", folder / "tokenizer" / "vocab.json"):
        options = ConvertOptions(force=True, config=folder, tokenizer=folder / "tokenizer")
        with pytest.raises(GgufSdError, match="which is read"):
            convert(path, target, options)
    assert digest(folder) == before
    assert main(["convert", str(path), "-o", str(path), "--force"]) == 2


def test_mixed_dtypes_of_queries_keys_and_values(tiny_pipeline: Make, tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    shutil.copytree(tiny_pipeline(xl=True), folder)
    path = folder / "text_encoder_2" / "model.safetensors"
    state = {name: value.clone() for name, value in load_file(path).items()}  # no part of the file written over
    names = {x: next(n for n in state if n.endswith(f"layers.0.self_attn.{x}_proj.weight")) for x in "qkv"}
    state[names["q"]] = state[names["q"]].half()
    state[names["v"]] = state[names["v"]].clone()
    state[names["v"]][0, 0] = 1e6
    save_file(state, path)
    target = tmp_path / "m.gguf"
    convert(folder, target, ConvertOptions(type="q8_0"))
    model = ModelFile.open(target)
    name = "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"
    stored = model.file.tensor(name)
    assert isinstance(stored, torch.Tensor)
    expected = torch.cat([state[names[x]].float() for x in "qkv"])
    assert torch.equal(stored.float(), expected)


@pytest.mark.parametrize("how", ["tensor", "header", "kohya"])
def test_zero_terminal_snr_is_refused_as_in_folders(single_file: Make, tmp_path: Path, how: str) -> None:
    original = single_file()
    path = tmp_path / "m.safetensors"
    markers = {"ztsnr": torch.zeros(0)} if how == "tensor" else {}
    header = {"tensor": {}, "header": {"ztsnr": "true"}, "kohya": {"ss_zero_terminal_snr": "True"}}[how]
    save_file(original.state | markers, path, header)
    with pytest.raises(GgufSdError, match="zero terminal SNR"):
        source_config(path, ConvertOptions(**original.options))


@pytest.mark.parametrize("header", [{}, {"modelspec.prediction_type": "v"}, {"v_pred": "1"}])
def test_v_prediction_is_heard(single_file: Make, tmp_path: Path, header: dict[str, str]) -> None:
    original = single_file()
    path = tmp_path / "m.safetensors"
    save_file(original.state | ({} if header else {"v_pred": torch.zeros(0)}), path, header)
    report = convert(path, tmp_path / "m.gguf", ConvertOptions(**original.options))
    assert report.notes == ["the source says that it predicts v"]
    assert ModelFile.open(tmp_path / "m.gguf").config.scheduler.prediction_type == "v_prediction"
    save_file(original.state, path, {"modelspec.prediction_type": "flow"})
    with pytest.raises(GgufSdError, match="prediction_type in its header is 'flow'; gguf-sd takes epsilon"):
        source_config(path, ConvertOptions(**original.options))


@pytest.mark.parametrize("metadata", ["[]", "7", '"x"', '{"a": 1}'])
def test_header_metadata_of_the_wrong_type(tmp_path: Path, metadata: str) -> None:
    text = f'{{"__metadata__": {metadata}, "x": {{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}}}'.encode()
    path = tmp_path / "m.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    message = "no Stable Diffusion UNet" if metadata == "[]" else "__metadata__ in its header is"
    with pytest.raises(GgufSdError, match=message):
        open_source(path)


@pytest.mark.parametrize("content", ['{"weight_map": {"a": 7}}', '{"weight_map": {"a": ["b"]}}', "[1]", "[" * 10**5])
def test_shard_index_of_the_wrong_type(tiny_pipeline: Make, tmp_path: Path, content: str) -> None:
    folder = tmp_path / "sharded"
    shutil.copytree(tiny_pipeline(), folder)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(content)
    with pytest.raises(GgufSdError, match=r"index\.json is no"):
        open_source(folder)


def test_types_in_any_case(tiny_pipeline: Make, tmp_path: Path) -> None:
    report = convert(tiny_pipeline(), tmp_path / "a.gguf", ConvertOptions(type="Q4_0"))
    convert(tiny_pipeline(), tmp_path / "b.gguf", ConvertOptions(type="q4_0"))
    assert report.type == "q4_0"
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_no_safety_leaves_the_checker_out(tiny_pipeline: Make, tmp_path: Path) -> None:
    for flags, has in (([], True), (["--no-safety"], False)):
        target = tmp_path / "m.gguf"
        arguments = ["convert", str(tiny_pipeline(safety=True)), "-o", str(target), "--force", "--quiet", *flags]
        assert main(arguments) == 0
        model = ModelFile.open(target)
        assert (model.config.safety is not None) == has
        assert any(name.startswith("safety_checker.") for name in model.names) == has


def test_exclamation_marks_are_padding_for_nobody(tiny_pipeline: Make, tmp_path: Path) -> None:
    """SDXL's published tokenizer_2 pads with "!", token 0: we pad by id, and "!" in a prompt stays an ordinary word."""
    import json

    folder = tmp_path / "xl"
    shutil.copytree(tiny_pipeline(xl=True), folder)
    settings = folder / "tokenizer_2" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"pad_token": "!"}))
    convert(folder, tmp_path / "m.gguf", ConvertOptions(type="q8_0"))
    model = ModelFile.open(tmp_path / "m.gguf")
    bpe = tokenizers.Tokenizer.from_str(model.file.metadata["tokenizer.huggingface.json"])
    assert model.config.text[1].pad_token_id == bpe.token_to_id("!")
    ids = model.tokenizer().encode("a red cat! dog!!", model.config.text[1]).ids[0].tolist()
    plain = bpe.encode("a red cat! dog!!", add_special_tokens=False).ids
    assert ids[1 : 1 + len(plain)] == plain
    assert bpe.token_to_id("!</w>") in plain
    assert bpe.encode("!", add_special_tokens=False).ids == [bpe.token_to_id("!</w>")]
    assert set(ids[2 + len(plain) :]) == {bpe.token_to_id("!")}
