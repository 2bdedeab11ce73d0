"""What users of other programs bring along: names, flags and files; on the tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from gguf_sd.cli.main import main
from gguf_sd.config import SD15
from gguf_sd.errors import GgufSdError
from gguf_sd.pipeline import Pipeline
from gguf_sd.request import MAX_SEED, Request, prepare

FAST = ["--steps", "2", "--width", "32", "--height", "32", "--device", "cpu", "--dtype", "float32", "--quiet"]


@pytest.fixture(scope="module")
def model(tiny_pipeline: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "tiny.gguf"
    assert main(["convert", str(tiny_pipeline()), "-o", str(path), "--type", "q8_0", "--quiet"]) == 0
    return path


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_two_runs_leave_two_pictures(model: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(model), "-p", "a cat", "--seed", "1", *FAST]) == 0
    first = Path("out-0001.png").read_bytes()
    assert main(["generate", "-m", str(model), "--from", "out-0001.png", *FAST, "--preview", "1"]) == 0
    assert capsys.readouterr().out == "out-0001.png  seed 1\nout-0002.png  seed 1\n"
    assert Path("out-0001.png").read_bytes() == first
    assert main(["generate", str(model), "--from", "out-0001.png", "-o", "out-0001.png", "--force"]) == 2
    assert "is an input of this run" in capsys.readouterr().err
    assert Path("out-0001.png").read_bytes() == first
    assert Image.open("out-0002.preview.png").info["parameters"].startswith("a cat\nSteps: 2,")


def test_other_programs_flags(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = [
        "--cfg-scale",
        "3",
        "--sampling-method",
        "Euler a",
        "-W",
        "32",
        "-H",
        "40",
        "--batch-count",
        "2",
        "-s",
        "7",
    ]
    assert main(["generate", str(model), "-p", "a cat", "--steps", "1", "--device", "cpu", *theirs, "--json"]) == 0
    settings = json.loads(capsys.readouterr().out)["settings"]
    wanted = {"guidance": 3.0, "sampler": "euler_a", "width": 32, "height": 40, "count": 2, "seed": 7}
    assert {name: settings[name] for name in wanted} == wanted
    assert main(["generate", "--help"]) == 0
    assert capsys.readouterr().out.count("--cfg-scale") == 1


def test_everything_of_an_inpainting_comes_back(model: Path, tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 72, 3), np.uint8)).save("start.png")
    mask = Image.new("RGBA", (72, 40), "black")
    mask.paste("white", (20, 8, 40, 30))
    mask.save("mask.png")
    begin = ["generate", str(model), "--init-image", "start.png", "--mask", "mask.png", "--device", "cpu", "--quiet"]
    settings = ["-p", "a\nNegative prompt: cat", "--strength", "0.7", "--mask-blur", "2", "--resize", "fit"]
    settings += ["--clip-skip", "2", "--no-paste", "--seed", str(MAX_SEED), "--steps", "4", "--width", "64"]
    assert main([*begin, *settings, "-o", "first.png", "--dtype", "float32"]) == 0
    assert main([*begin, "--from", "first.png", "-o", "again.png"]) == 0
    assert Image.open("again.png").info["parameters"] == Image.open("first.png").info["parameters"]
    assert Image.open("again.png").tobytes() == Image.open("first.png").tobytes()
    assert Image.open("first.png").size == (64, 40)


def test_flags_override_an_unknown_sampler(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from gguf_sd.imaging.save_png import save_png

    text = "a cat\nSteps: 2, Sampler: Restart 2000, Schedule type: Odd, Seed: 4, Size: 32x32"
    save_png(Image.new("RGB", (8, 8)), Path("a.png"), {"parameters": text})
    assert main(["generate", str(model), "--from", "a.png", "--quiet"]) == 2
    assert "a.png, or choose one with --sampler: unknown sampler 'Restart 2000'" in capsys.readouterr().err
    assert main(["generate", str(model), "--from", "a.png", "--sampler", "euler", "--quiet"]) == 0


def test_an_interruption_tells_what_was_saved(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paint = Pipeline.paint

    def interrupted(self: Pipeline, *args: object) -> object:
        yield next(paint(self, *args))  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(Pipeline, "paint", interrupted)
    assert main(["generate", str(model), "--seed", "5", "--count", "3", *FAST]) == 130
    assert capsys.readouterr().out == "out-0001.png  seed 5\n"


def test_wrong_arguments_cost_no_conversion(
    tiny_pipeline: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("gguf_sd.cli.cache.model_path", lambda *a, **k: pytest.fail("converted before all was checked"))
    Image.new("RGB", (8, 8)).save("stranger.png")
    command = ["generate", str(tiny_pipeline())]
    for wrong in (
        ["-o", "stranger.png"],
        ["--sampler", "eulr"],
        ["--sampler", "pndm", "--schedule", "karras"],
        ["--dtype", "int3"],
        ["--kernels", "cuda"],
        ["--steps", "0"],
        ["--seed", "-2"],
        ["--strength", "2"],
        ["--init-image", "none.png"],
        ["--vae", "none.safetensors"],
        ["--tokenizer", "none"],
        ["--mask", "stranger.png"],
    ):
        assert main([*command, *wrong]) == 2, wrong
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("size", [(515, 389), (512, 64), (71, 9)])
def test_the_pictures_own_size_as_in_diffusers(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size)
    processor = VaeImageProcessor(vae_scale_factor=8)
    height, width = processor.get_default_height_width(image)
    job = prepare(Request(image=image), SD15)
    assert (job.width, job.height) == (width, height)
    assert prepare(Request(image=image, width=64), SD15).width == 64


@pytest.mark.parametrize(
    ("settings", "note"),
    [
        ({"strength": 0.5}, "strength has no effect without a picture"),
        ({"resize": "fit"}, "resize has no effect without a picture"),
        ({"mask_blur": 8}, "mask blur has no effect without a mask"),
        ({"negative_prompt": "dog", "guidance": 1.0}, "the negative prompt has no effect at guidance 1"),
        ({"prompt": "a <hypernet:cat:0.7> cat"}, "<hypernet:cat:0.7> in the prompt loads nothing"),
        ({"negative_prompt": "a <lora:cat:0.7> cat"}, "<lora:cat:0.7> in the prompt loads nothing"),
        ({"prompt": "a [cat:dog:0.5]"}, "[cat:dog:0.5] in the prompt does not change"),
        ({"prompt": "a [cat|dog]"}, "[cat|dog] in the prompt does not alternate"),
        ({"crop": (8, 8)}, "original size and crop have no effect"),
    ],
)
def test_what_has_no_effect_is_told_once(settings: dict, note: str, caplog: pytest.LogCaptureFixture) -> None:
    prepare(Request(**settings), SD15)
    assert [record.getMessage() for record in caplog.records if note in record.getMessage()] == [caplog.messages[0]]
    caplog.clear()
    prepare(Request("a (cat:1.2) [dog], \\[x:0.5\\]", negative_prompt="red"), SD15)
    assert not caplog.messages


def test_values_of_every_kind() -> None:
    job = prepare(Request(np.str_("cat"), steps=np.int64(3), guidance=np.float32(2), seed=np.uint64(MAX_SEED)), SD15)  # type: ignore[arg-type]
    assert (type(job.steps), job.guidance, job.seed) == (int, 2.0, MAX_SEED)
    assert next(prepare(Request(seed=MAX_SEED, batch=2, count=2), SD15).batches()) == [MAX_SEED, 0]
    assert prepare(Request(seed=-1), SD15).seed >= 0
    for wrong, message in (
        ({"steps": 2.5}, "steps must be a whole number, got 2.5"),
        ({"steps": True}, "steps must be a whole number"),
        ({"guidance": float("nan")}, "guidance must be a finite number, got nan"),
        ({"prompt": b"cat"}, "prompt must be a text"),
        ({"prompt": "\udcff"}, "prompt must be a text"),
        ({"crop": 4}, "crop must be two whole numbers"),
        ({"image": "cat.png"}, "image must be a PIL image"),
        ({"seed": -2}, "seed must lie in"),
        ({"count": 10**9}, "count must be at least 1 and at most"),
        ({"width": 2**20, "height": 2**20}, "is too large"),
    ):
        with pytest.raises(GgufSdError, match=message):
            prepare(Request(**wrong), SD15)
