"""`gguf-sd generate` and `inspect` as a user runs them."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from gguf_sd.cli.generate import _notes
from gguf_sd.cli.main import main
from gguf_sd.imaging.png_metadata import parse_parameters

FAST = ["--steps", "2", "--width", "32", "--height", "32", "--device", "cpu", "--dtype", "float32", "--quiet"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GGUF_SD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def model(tiny_pipeline: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "tiny.gguf"
    assert main(["convert", str(tiny_pipeline()), "-o", str(path), "--type", "q8_0", "--quiet"]) == 0
    return path


def test_picture_with_its_settings(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.png"
    command = ["generate", str(model), "-p", "a cat, red", "-n", "dog", "-o", str(out), "--seed", "7", *FAST]
    assert main([*command, "--sampler", "DPM++ 2M Karras", "--guidance", "6.5", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["files"] == [{"path": str(out), "seed": 7, "flagged": False}]
    assert report["settings"]["sampler"] == "dpmpp_2m"
    picture = Image.open(out)
    assert picture.size == (32, 32)
    lines = picture.info["parameters"].split("\n")
    assert lines[:2] == ["a cat, red", "Negative prompt: dog"]
    assert lines[2].startswith(
        "Steps: 2, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 6.5, Seed: 7, Size: 32x32, Model hash: "
    )
    assert "Model: tiny" in lines[2]


def test_the_same_seed_the_same_picture(model: Path, tmp_path: Path) -> None:
    def paint(name: str, *more: str) -> bytes:
        command = ["generate", str(model), "-p", "a cat", "-o", str(tmp_path / name), "--seed", "3", *FAST, *more]
        assert main(command) == 0
        return Image.open(tmp_path / name).tobytes()

    first = paint("a.png")
    assert paint("b.png") == first
    assert paint("c.png", "--seed", "4") != first


def test_settings_are_read_back(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, again, other = (tmp_path / name for name in ("first.png", "again.png", "other.png"))
    settings = ["-p", 'a (cat:1.2), "red"', "-n", "dög", "--sampler", "DPM++ 2M Karras", "--guidance", "3.5"]
    assert main(["generate", str(model), "-o", str(first), "--seed", "7", "--clip-skip", "2", *settings, *FAST]) == 0
    assert main(["generate", str(model), "--from", str(first), "-o", str(again), "--device", "cpu", "--quiet"]) == 0
    assert Image.open(again).tobytes() == Image.open(first).tobytes()
    assert Image.open(again).info["parameters"] == Image.open(first).info["parameters"]
    assert main(["generate", str(model), "--from", str(first), "--seed", "8", "-o", str(other), "--quiet"]) == 0
    assert "Seed: 8," in Image.open(other).info["parameters"]
    assert Image.open(other).tobytes() != Image.open(first).tobytes()
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    assert main(["generate", str(model), "--from", str(tmp_path / "plain.png"), "-o", str(again)]) == 2
    assert "carries no settings" in capsys.readouterr().err


def test_settings_of_automatic1111_are_understood() -> None:
    text = "a castle\nin fog\nNegative prompt: people\nSteps: 28, Sampler: DPM++ 2M Karras, CFG scale: 6.5, Seed: 99, "
    text += 'Size: 512x768, Model hash: 6ce0161689, Model: v1-5-pruned, Lora hashes: "a: 1, b: 2", Version: v1.7.0'
    settings = parse_parameters(text)
    assert settings == {
        "prompt": "a castle\nin fog",
        "negative_prompt": "people",
        "steps": 28,
        "sampler": "DPM++ 2M Karras",
        "guidance": 6.5,
        "seed": 99,
        "width": 512,
        "height": 768,
        "model": "v1-5-pruned",
        "model_hash": "6ce0161689",
        "lora_hashes": "a: 1, b: 2",
    }


def test_image_to_image_and_inpainting(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (50, 40), "orange").save(tmp_path / "start.jpg")
    mask = Image.new("L", (32, 32))
    mask.paste(255, (16, 0, 32, 32))
    mask.save(tmp_path / "mask.png")
    command = ["generate", str(model), "-p", "a cat", "--init-image", str(tmp_path / "start.jpg"), "--seed", "1", *FAST]
    assert main([*command, "-o", str(tmp_path / "a.png"), "--strength", "0.5"]) == 0
    assert "Denoising strength: 0.5" in Image.open(tmp_path / "a.png").info["parameters"]
    assert main([*command, "-o", str(tmp_path / "b.png"), "--mask", str(tmp_path / "mask.png")]) == 0
    left = Image.open(tmp_path / "b.png").crop((0, 0, 16, 32)).getcolors()
    assert left is not None
    assert len(left) <= 3, "outside the mask stands the picture, resized"
    assert main([*command, "-o", str(tmp_path / "c.png"), "--strength", "0.2"]) == 2
    assert "take a strength of at least 0.5" in capsys.readouterr().err


def test_previews(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    assert main(["generate", str(model), "-o", str(out), "--preview", "1", *FAST]) == 0
    assert Image.open(tmp_path / "out.preview.png").size == (32, 32)
    assert main(["generate", str(model), "-o", str(out), "--vae", str(model), *FAST]) == 0
    same = Image.open(out).tobytes()
    again = tmp_path / "again.png"
    assert main(["generate", str(model), "-o", str(again), "--from", str(out), *FAST]) == 0
    assert Image.open(again).tobytes() == same


def test_flagged_pictures(
    tiny_pipeline: Callable[..., Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Blurred unless told otherwise."""
    model, out = tmp_path / "safe.gguf", tmp_path / "out.png"
    assert main(["convert", str(tiny_pipeline(safety=True)), "-o", str(model), "--quiet"]) == 0
    paint = ["generate", str(model), "-o", str(out), "--seed", "1", *FAST]
    monkeypatch.setattr("gguf_sd.models.safety.SafetyChecker.flagged", lambda self, images: [True] * len(images))
    assert main([*paint, "--safety", "off"]) == 0
    plain = Image.open(out).tobytes()
    assert main([*paint, "--safety", "warn"]) == 0
    assert "flagged by the safety checker" in caplog.text
    assert Image.open(out).tobytes() == plain
    assert main(paint) == 0
    assert Image.open(out).tobytes() != plain
    assert main([*paint, "--safety", "maybe"]) == 2


def test_several_pictures(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", str(model), "-p", "a cat", "-o", str(tmp_path / "out.png"), "--seed", "3", *FAST]
    assert main([*command, "--count", "3", "--batch", "2", "--json"]) == 0
    files = json.loads(capsys.readouterr().out)["files"]
    assert [(Path(f["path"]).name, f["seed"]) for f in files] == [("out-1.png", 3), ("out-2.png", 4), ("out-3.png", 5)]
    assert sorted(p.name for p in tmp_path.glob("*.png")) == ["out-1.png", "out-2.png", "out-3.png"]


def test_a_folder_is_converted_once(
    tiny_pipeline: Callable[..., Path], tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["generate", str(tiny_pipeline()), "--type", "q4_0", "-p", "a cat", "-o", str(tmp_path / "a.png"), *FAST]
    assert main(command) == 0
    (converted,) = cache.glob("*.gguf")
    assert "q4_0" in converted.name
    monkeypatch.setattr("gguf_sd_convert.convert.convert", lambda *args, **kwargs: pytest.fail("converted again"))
    assert main(command) == 0
    assert list(cache.glob("*.gguf")) == [converted]


def test_inspect(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(model), "--json", "--tensors"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["layout"], facts["type"], facts["architecture"]) == ("native", "q8_0", "sd1")
    assert set(facts["parts"]) == {"unet", "vae", "text encoder"}
    assert "Q8_0" in facts["parts"]["unet"]
    assert sum(n["bytes"] for part in facts["parts"].values() for n in part.values()) < facts["bytes"]
    assert len(facts["tensors"]) == sum(n["tensors"] for part in facts["parts"].values() for n in part.values())
    assert main(["inspect", str(model)]) == 0
    text = capsys.readouterr().out
    assert "Q8_0" in text
    assert "gguf_sd.format_version = 1" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "{tmp}/none.gguf"], "none.gguf does not exist"),
        (["generate", "{tmp}/text.gguf"], "text.gguf is not a GGUF file"),
        (["generate", "{model}", "-o", "{tmp}/out.jpg"], "must end in .png"),
        (["generate", "{model}", "-o", "{tmp}/nowhere/out.png"], "nowhere does not exist"),
        (["generate", "{model}", "-o", "/proc/out.png"], "cannot write to /proc"),
        (["generate", "{model}", "--width", "33"], "no multiple of 8"),
        (["generate", "{model}", "--sampler", "eulr"], "did you mean euler"),
        (["generate", "{model}", "--device", "tpu"], "device 'tpu'"),
        (["generate", "{model}", "--dtype", "int3"], "unknown dtype 'int3'"),
        (["generate", "{model}", "--weights", "none"], "unknown weights mode 'none'"),
        (["generate", "{model}", "--kernels", "cuda"], "unknown kernels 'cuda'"),
        (["generate", "{model}", "--kernels", "fused", "--device", "cpu"], "run on a GPU"),
        (["generate", "{model}", "--cuda-graph", "maybe"], "unknown CUDA graph mode 'maybe'"),
        (["generate", "{model}", "--cuda-graph", "on", "--device", "cpu"], "CUDA graphs need an NVIDIA or AMD GPU"),
        (["generate", "{model}", "--type", "q4_0"], "is a GGUF file already"),
        (["inspect", "{tmp}/text.gguf"], "text.gguf is not a GGUF file"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (tmp_path / "text.gguf").write_text("hello, I am no GGUF file at all")
    filled = [a.format(tmp=tmp_path, model=model) for a in arguments]
    if filled[0] == "generate" and "-o" not in filled:
        filled += ["-o", str(tmp_path / "out.png")]
    assert main(filled) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.glob("*.png"))


def test_a_reader_that_leaves_is_no_error(model: Path) -> None:
    command = f"{sys.executable} -m gguf_sd.cli.main inspect {model} --tensors | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("file")
    assert done.stderr == ""


def test_missing_tensors_are_named(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file whose header no longer lists a tensor, as a bad conversion would leave it."""
    data = model.read_bytes()
    name = b"model.diffusion_model.out.2.bias"
    (tmp_path / "less.gguf").write_bytes(data.replace(name, name.replace(b"out.2", b"not.2")))
    assert main(["generate", str(tmp_path / "less.gguf"), "-o", str(tmp_path / "out.png"), *FAST]) == 2
    assert "lacks 1 of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("device", "asked", "kernels", "noted"),
    [
        ("cuda", "auto", "torch", True),
        ("cuda", "auto", "auto", False),
        ("cuda", "torch", "torch", False),
        ("cpu", "auto", "torch", False),
    ],
)
def test_a_gpu_without_triton_is_noted(device: str, asked: str, kernels: str, noted: bool) -> None:
    pipeline: Any = SimpleNamespace(
        model=SimpleNamespace(config=SimpleNamespace(safety=None)), device=torch.device(device), kernels=kernels
    )
    notes = list(_notes(pipeline, argparse.Namespace(safety="off", kernels=asked)))
    assert any("Triton is not installed" in note for note in notes) == noted
