"""ControlNets from files: converting, recognising, and `generate --control` as a user runs it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from gguf_sd.checkpoint import control_file
from gguf_sd.checkpoint.control_file import ControlFile
from gguf_sd.checkpoint.tensor_names import CONTROL, control_modules, rename
from gguf_sd.cli.main import main
from gguf_sd_convert.sources import control_source
from tests.control.test_pictures import drawn

FAST = ["--steps", "2", "--device", "cpu", "--dtype", "float32", "--quiet", "--seed", "3", "-p", "a red cat"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GGUF_SD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    drawn(1).save(tmp_path / "edges.png")
    return tmp_path / "edges.png"


def ldm(folder: Path, file: Path) -> dict[str, torch.Tensor]:
    """A ControlNet's weights as original checkpoints have them."""
    modules = control_modules(ControlFile.open(file).config)
    state = load_file(folder / "diffusion_pytorch_model.safetensors")
    return {f"{CONTROL}{rename(name, modules)}": tensor for name, tensor in state.items()}


def tensors_of(path: Path) -> dict[str, bytes]:
    return {tensor.name: tensor.data.tobytes() for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize(
    "sources",
    [
        ["control_a.safetensors"],
        pytest.param(["b.safetensors", "control_c.pth", "d.safetensors"], marks=pytest.mark.slow),
    ],
)
def test_every_source_gives_the_same_file(
    tiny_control: Any, gguf_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sources: list[str]
) -> None:
    """A folder of diffusers, its file alone, an original file, pickled too, and one without the prefix."""
    folder = tiny_control()
    file = gguf_of(folder)
    config = ControlFile.open(file).config
    state, expected = ldm(folder, file), tensors_of(file)
    assert {t.tensor_type.name for t in gguf.GGUFReader(file).tensors} == {"F32", "F16", "Q4_0"}
    assert "input_hint_block.14.weight" in {name.removeprefix(CONTROL) for name in expected}
    save_file(state, tmp_path / "control_a.safetensors")
    save_file({name.removeprefix(CONTROL): value for name, value in state.items()}, tmp_path / "b.safetensors")
    torch.save({"state_dict": state}, tmp_path / "control_c.pth")
    save_file(load_file(folder / "diffusion_pytorch_model.safetensors"), tmp_path / "d.safetensors")
    # Tiny widths are no known ControlNet's.
    monkeypatch.setattr(control_source, "identify_control", lambda *given: config)
    monkeypatch.setattr(control_source, "_by_shape", lambda *given: config)
    for source in sources:
        command = ["convert", str(tmp_path / source), "-o", str(tmp_path / "out.gguf"), "--type", "q4_0", "--force"]
        assert main([*command, "--quiet"]) == 0, source
        assert tensors_of(tmp_path / "out.gguf") == expected, source


def test_shapes_of_the_known_ones() -> None:
    """Those of SD 1.5 and SDXL are told from their tensors, under both kinds of names."""
    from gguf_sd.checkpoint import inventory
    from gguf_sd.config import SD15, SDXL, ControlConfig

    for model in (SD15, SDXL):
        config = ControlConfig(model.name, model.unet)
        shapes = {CONTROL + name: shape for name, shape in inventory.controlnet(config)}
        assert control_file.identify_control(shapes, "x") == config
        assert not config.misfit(model)
    assert ControlConfig("sd1", SD15.unet).misfit(SDXL).startswith("its block_out_channels is [320, 640, 1280, 1280]")


def test_generate_with_a_folder_and_its_conversion(
    tiny_pipeline: Callable[..., Path], tiny_control: Any, gguf_of: Any, picture: Path, tmp_path: Path, cache: Path
) -> None:
    model, one, two = gguf_of(tiny_pipeline()), tmp_path / "one.png", tmp_path / "two.png"
    command = ["generate", str(model), "--control-image", str(picture), *FAST]
    assert main([*command, "--control", str(tiny_control()), "-o", str(one)]) == 0
    assert [path.name.endswith("-q4_0.gguf") for path in cache.glob("*.gguf")] == [True], "the model's own type"
    assert main([*command, "--control", str(gguf_of(tiny_control())), "-o", str(two)]) == 0
    assert Image.open(one).size == (64, 48)
    assert Image.open(one).tobytes() == Image.open(two).tobytes()


def test_what_is_recorded_is_repeated(
    tiny_pipeline: Callable[..., Path], tiny_control: Any, gguf_of: Any, picture: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    model, first, again = gguf_of(tiny_pipeline()), tmp_path / "first.png", tmp_path / "again.png"
    for name, seed in (("canny", 9), ("pose", 21)):
        (tmp_path / f"{name}.gguf").write_bytes(gguf_of(tiny_control(seed=seed)).read_bytes())
    (tmp_path / "control.gguf").write_bytes((tmp_path / "canny.gguf").read_bytes())
    nets = ["--control", str(tmp_path / "control.gguf"), "--control-image", str(picture)]
    command = ["generate", str(model), *nets, "--control-scale", "0.7", "--control-end", "0.8", *FAST]
    assert main([*command, "-o", str(first)]) == 0
    text = Image.open(first).info["parameters"]
    assert 'ControlNet 0: "Module: none, Model: control' in text
    assert "Weight: 0.7, Guidance Start: 0, Guidance End: 0.8, Image: edges.png" in text
    repeat = ["generate", str(model), "--from", str(first), "-o", str(again), "--device", "cpu", "--quiet"]
    assert main(repeat) == 0
    assert Image.open(again).tobytes() == Image.open(first).tobytes()
    assert Image.open(again).info["parameters"] == text
    assert main([*repeat, "--control-scale", "0.1"]) == 0
    assert Image.open(again).tobytes() != Image.open(first).tobytes()
    picture.unlink()
    assert main(repeat) == 2
    assert "the picture edges.png, which is not here; give it with --control-image" in capsys.readouterr().err
    (tmp_path / "control.gguf").unlink()
    assert main(repeat) == 2
    assert "the ControlNet control, which is not here; give it with --control" in capsys.readouterr().err


def test_its_memory_is_planned(
    tiny_pipeline: Callable[..., Path], tiny_control: Any, gguf_of: Any, picture: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    model, control = gguf_of(tiny_pipeline()), gguf_of(tiny_control())
    plain = ["generate", str(model), "--width", "64", "--height", "48", "--plan", "--json", *FAST]
    plans = []
    for more in ([], ["--control", str(control), "--control-image", str(picture)]):
        assert main([*plain, *more]) == 0
        plans.append(json.loads(capsys.readouterr().out))
    assert plans[1]["placement"]["control 0"] == plans[1]["placement"]["unet"]
    grown = plans[1]["stages"]["unet"] - plans[0]["stages"]["unet"]
    assert grown > control.stat().st_size


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--control", "{control}"], "1 ControlNets are given and 0 pictures"),
        (["--control-image", "{picture}"], "0 ControlNets are given and 1 pictures"),
        (["--control-scale", "1"], "--control-scale is for a ControlNet"),
        (["--control", "none.gguf", "--control-image", "{picture}"], "the ControlNet none.gguf does not exist"),
        (["--control", "{model}", "--control-image", "{picture}"], "is no ControlNet; --control takes a ControlNet"),
        (["--control", "{unet}", "--control-image", "{picture}"], "is a UNet alone; --control takes a ControlNet"),
        (["--control", "{control}", "--control-image", "{control}"], "cannot read the picture"),
        (["--control", "{control}", "--control-image", "{picture}", "--control-scale", "-1"], "from 0 to 100"),
        (["--control", "{control}", "--control-image", "{picture}", "--control-start", "1"], "the end must be greater"),
        (["--control", "{xl}", "--control-image", "{picture}"], "a ControlNet for SDXL, the model is Stable Diffusion"),
    ],
)
def test_bad_input_is_one_sentence(
    tiny_pipeline: Callable[..., Path], tiny_control: Any, gguf_of: Any, picture: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str,
) -> None:  # fmt: skip
    known = {"control": gguf_of(tiny_control()), "picture": picture, "model": gguf_of(tiny_pipeline())}
    known |= {"unet": tiny_pipeline() / "unet", "xl": gguf_of(tiny_control(xl=True))}
    filled = [argument.format(**known) for argument in arguments]
    assert main(["generate", str(known["model"]), *filled, "-o", str(tmp_path / "out.png"), *FAST]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--layout", "comfy"], "leave --layout out"),
        (["--preset", "sd15"], "is a ControlNet, which --preset is not for"),
        (["--ema"], "is a ControlNet, which --ema is not for"),
    ],
)
def test_options_that_are_not_for_it(
    tiny_control: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert main(["convert", str(tiny_control()), "-o", str(tmp_path / "x.gguf"), *more]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_pool_conditions": True}, "global_pool_conditions is True; gguf-sd takes False"),
        ({"mid_block_type": "UNetMidBlock2D"}, "mid_block_type is 'UNetMidBlock2D'"),
        ({"conditioning_embedding_out_channels": []}, "conditioning_embedding_out_channels is"),
    ],
)
def test_what_is_not_run_is_refused_by_name(
    tiny_control: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    source, folder = tiny_control(), tmp_path / "edited"
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    assert main(["convert", str(folder), "-o", str(tmp_path / "x.gguf")]) == 2
    assert message in capsys.readouterr().err


def test_a_damaged_file(tiny_control: Any, gguf_of: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = gguf_of(tiny_control()).read_bytes()
    for old, new, message in (
        (b"control_model.zero_convs.0.0.bias", b"control_model.zero_convs.0.0.bios", "lacks 1 of"),
        (b'"hint_channels": [8', b'"hint_chanels": [88', "damaged metadata: gguf_sd.control"),
    ):
        assert data.count(old) == 1
        (tmp_path / "bad.gguf").write_bytes(data.replace(old, new))
        with pytest.raises(control_file.GgufSdError, match=message):
            ControlFile.open(tmp_path / "bad.gguf")
