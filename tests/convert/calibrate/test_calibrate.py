"""Calibrated conversions of a tiny pipeline: its UNet's output, its files, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from gguf_sd.bench.calls import Samples, default_count, prompts_for, step_effects
from gguf_sd.bench.prompts import default_prompts, read_prompts
from gguf_sd.checkpoint.model_file import ModelFile
from gguf_sd.cli.main import main
from gguf_sd.config import SD15
from gguf_sd.errors import GgufSdError
from gguf_sd_convert.calibrate import walk
from gguf_sd_convert.calibrate.imatrix import read_imatrix
from gguf_sd_convert.calibrate.options import Calibration
from gguf_sd_convert.convert import ConvertOptions, convert

PROMPTS = "a red cat\n\n# no prompt\na dog\n"
CALIBRATION = Calibration(samples=12)


@pytest.fixture(scope="module")
def model(tiny_pipeline: Callable[..., Path]) -> Path:
    return tiny_pipeline(unet={"sample_size": 8})


@pytest.fixture(scope="module")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model in F16, plain and calibrated Q4_0, and the calibration's data."""
    folder = tmp_path_factory.mktemp("calibrated")
    (folder / "prompts.txt").write_text(PROMPTS)
    convert(model, folder / "f16.gguf", ConvertOptions(type="f16"))
    convert(model, folder / "plain.gguf", ConvertOptions(type="q4_0"))
    options = replace(CALIBRATION, prompts=folder / "prompts.txt", save=folder / "data.gguf")
    report = convert(model, folder / "calibrated.gguf", ConvertOptions(type="q4_0", calibration=options))
    assert any(note.startswith("calibrated on 12 calls") for note in report.notes)
    return folder


def calls(folder: Path) -> Samples:
    config = ModelFile.open(folder / "f16.gguf").config
    found = read_imatrix(folder / "data.gguf", config).calls
    assert found is not None
    return found


@torch.inference_mode()
def output_error(path: Path, folder: Path, seed: int = 5) -> float:
    """Of the UNet's output, relative to F16's, on latents that it was not calibrated on."""
    s = calls(folder)
    latents = s.latents + 0.3 * torch.randn(s.latents.shape, generator=torch.Generator().manual_seed(seed))
    got, wanted = (
        ModelFile.open(p).load_unet(torch.float32)(latents, s.timesteps, s.contexts[s.prompt])
        for p in (path, folder / "f16.gguf")
    )
    return float((got - wanted).norm() / wanted.norm())


def test_output_suffers_less_at_the_same_size(made: Path) -> None:
    assert output_error(made / "calibrated.gguf", made) < 0.75 * output_error(made / "plain.gguf", made)
    plain, calibrated = (gguf.GGUFReader(made / f"{name}.gguf") for name in ("plain", "calibrated"))
    assert [(t.name, t.tensor_type, list(t.shape)) for t in plain.tensors] == [
        (t.name, t.tensor_type, list(t.shape)) for t in calibrated.tensors
    ]
    facts = json.loads(calibrated.fields["gguf_sd.calibration"].contents())
    assert (facts["calls"], facts["prompts"]) == (12, 2)
    assert not [path for path in made.iterdir() if path.name.startswith(".")]


@pytest.mark.slow
def test_saved_data_serves_another_type_and_layout(made: Path, model: Path, tmp_path: Path) -> None:
    data = Calibration(imatrix=made / "data.gguf")
    for kind, layout in (("q4_1", "comfy"), ("q5_k", "native")):
        target = tmp_path / f"{kind}.gguf"
        convert(model, target, ConvertOptions(type=kind, layout=layout, calibration=data))
        convert(model, tmp_path / "plain.gguf", ConvertOptions(type=kind, layout=layout, force=True))
        assert output_error(target, made) < 0.9 * output_error(tmp_path / "plain.gguf", made)


def test_the_file_is_an_importance_matrix_as_llama_cpp_writes_it(made: Path) -> None:
    reader = gguf.GGUFReader(made / "data.gguf")
    assert reader.fields["general.type"].contents() == "imatrix"
    assert {"imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"} <= reader.fields.keys()
    tensors = {t.name: t for t in reader.tensors}
    name = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"
    assert list(tensors[f"{name}.in_sum2"].shape) == [288]
    assert float(tensors[f"{name}.counts"].data[0]) > 0


@pytest.mark.slow
def test_the_squares_alone_choose_scales(made: Path, model: Path, tmp_path: Path) -> None:
    """In a file as other programs write it."""
    tensors = {t.name: t for t in gguf.GGUFReader(made / "data.gguf").tensors}
    bare = tmp_path / "bare.gguf"
    writer = gguf.GGUFWriter(bare, "imatrix")
    for key, tensor in tensors.items():
        if not key.startswith("gguf_sd."):
            writer.add_tensor(key, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    options = ConvertOptions(type="q4_0", calibration=Calibration(imatrix=bare))
    convert(model, tmp_path / "weighted.gguf", options)
    assert (tmp_path / "weighted.gguf").read_bytes() != (made / "plain.gguf").read_bytes()
    assert output_error(tmp_path / "weighted.gguf", made) < 1.15 * output_error(made / "plain.gguf", made)


@pytest.mark.slow
def test_wide_layers_are_taken_apart(made: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gguf_sd_convert.calibrate import moments

    monkeypatch.setattr(moments, "MAX_COLUMNS", 300)
    monkeypatch.setattr(walk, "MAX_PLACES", 4000)
    convert(
        model, tmp_path / "x.gguf", ConvertOptions(type="q4_0", calibration=Calibration(imatrix=made / "data.gguf"))
    )
    assert output_error(tmp_path / "x.gguf", made) < 0.9 * output_error(made / "plain.gguf", made)


@pytest.mark.slow
def test_sdxl(tiny_pipeline: Callable[..., Path], tmp_path: Path) -> None:
    options = ConvertOptions(type="q4_0", calibration=Calibration(samples=8))
    convert(tiny_pipeline(xl=True, unet={"sample_size": 8}), tmp_path / "xl.gguf", options)
    assert ModelFile.open(tmp_path / "xl.gguf").load_unet(torch.float32) is not None


@pytest.mark.slow
def test_diffusers_loads_a_calibrated_file(made: Path, model: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="diffusers loads GGUF files through it")
    from diffusers import GGUFQuantizationConfig, UNet2DConditionModel

    path = tmp_path / "linear.gguf"
    data = Calibration(imatrix=made / "data.gguf")
    convert(model, path, ConvertOptions(type="q4_0", layout="linear", calibration=data))
    loaded = UNet2DConditionModel.from_single_file(
        str(path),
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
        config=str(model),
        subfolder="unet",
        torch_dtype=torch.float32,
    )
    s = calls(made)
    with torch.no_grad():
        theirs = loaded(s.latents, s.timesteps, s.contexts[s.prompt]).sample
        ours = ModelFile.open(path).load_unet(torch.float32)(s.latents, s.timesteps, s.contexts[s.prompt])
    assert (theirs - ours).norm() < 2e-3 * theirs.norm()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--type", "f16", "--calibrate"], "nothing to calibrate in f16"),
        (["--prompts", "p.txt"], "--prompts has no effect without --calibrate"),
        (["--calibrate", "--type", "q4_0", "--samples", "-1"], "samples is -1"),
        (["--calibrate", "--prompts", "missing.txt"], "cannot read missing.txt"),
        (["--imatrix", "missing.gguf"], "missing.gguf does not exist"),
        (["--type", "mixed"], "either a target size"),
        (["--type", "mixed", "--bpw", "2"], "bpw is 2"),
        (["--type", "q4_0", "--calibrate", "--bpw", "5"], "--bpw has no effect without --type mixed"),
        (["--type", "q4_0", "--calibrate", "--save-imatrix", "x.gguf"], "x.gguf is where the model goes"),
        (["--type", "q4_0", "--calibrate", "--save-imatrix", "there/i.gguf"], "there is no folder"),
        (["--type", "mixed", "--target-size", "lots"], "--target-size is"),
    ],
)
def test_bad_arguments_are_one_sentence(
    arguments: list[str], complaint: str, model: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["convert", str(model), "-o", "x.gguf", "--quiet", *arguments]) == 2
    assert complaint in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_is_recorded_outlives_an_interruption(
    made: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(name: str, stage: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(walk.Walk, "_stage", lambda self, name, stage: stop(name, stage))
        options = replace(CALIBRATION, prompts=made / "prompts.txt", save=tmp_path / "data.gguf")
        with pytest.raises(KeyboardInterrupt):
            convert(model, tmp_path / "x.gguf", ConvertOptions(type="q4_0", calibration=options))
    assert [path.name for path in tmp_path.iterdir()] == ["data.gguf"]
    with pytest.raises(GgufSdError, match=r"data\.gguf exists; --force replaces it"):
        convert(model, tmp_path / "x.gguf", ConvertOptions(type="q4_0", calibration=options))
    taken = Calibration(imatrix=tmp_path / "data.gguf")
    with pytest.raises(GgufSdError, match="holds recorded calls already; leave --prompts and --samples out"):
        convert(model, tmp_path / "x.gguf", ConvertOptions(type="q4_0", calibration=replace(taken, samples=4)))
    convert(model, tmp_path / "x.gguf", ConvertOptions(type="q4_0", calibration=taken))
    blocks = [
        {t.name: t.data.tobytes() for t in gguf.GGUFReader(path).tensors}
        for path in (tmp_path / "x.gguf", made / "calibrated.gguf")
    ]
    assert blocks[0] == blocks[1]


def test_data_of_another_model_are_refused(made: Path, tiny_pipeline: Callable[..., Path], tmp_path: Path) -> None:
    options = ConvertOptions(type="q4_0", calibration=Calibration(imatrix=made / "data.gguf"))
    with pytest.raises(GgufSdError, match="another model's UNet"):
        convert(tiny_pipeline(xl=True), tmp_path / "x.gguf", options)
    with pytest.raises(GgufSdError, match="is no importance matrix"):
        read_imatrix(made / "plain.gguf", ModelFile.open(made / "plain.gguf").config)


@pytest.mark.parametrize(("edge", "calls", "prompts"), [(512, 16, 3), (256, 64, 11), (128, 256, 43), (64, 768, 128)])
def test_large_pictures_are_calibrated_on_few_calls(edge: int, calls: int, prompts: int) -> None:
    config = replace(SD15, defaults=replace(SD15.defaults, width=edge, height=edge))
    assert (default_count(config), prompts_for(calls)) == (calls, prompts)


def test_prompts(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text(PROMPTS)
    assert read_prompts(path) == ["a red cat", "a dog"]
    for text in (b"\n# nothing\n", b"\xff\xfe\x00", b"x" * ((1 << 20) + 1)):
        path.write_bytes(text)
        with pytest.raises(GgufSdError, match=r"p\.txt"):
            read_prompts(path)
    assert len(set(default_prompts(tmp_path))) == 64


def test_early_and_guided_errors_count_as_they_move_the_latents(made: Path) -> None:
    """A model that predicts eps exactly for x0 ~ N(0, 1): an error of one step, carried to the end."""
    config = ModelFile.open(made / "f16.gguf").config
    effects = step_effects(config, [900, 700, 400, 100])
    assert effects[0] > effects[3] > 0
    assert effects[-1] == pytest.approx(step_effects(config, [100])[0])
