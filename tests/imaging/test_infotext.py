"""The text of settings: round trips, other programs' pictures, and hostile texts."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
from PIL import Image

from gguf_sd.errors import GgufSdError
from gguf_sd.imaging.infotext import compose, decompose
from gguf_sd.imaging.png_metadata import parse_parameters, read_parameters

PAIRS = {"Steps": 20, "Sampler": "Euler", "Model": 'a "b", c: d', "Version": "gguf-sd 0"}
# How AUTOMATIC1111 finds the pairs in a line: what it takes for a key, and for a quoted value.
THEIR_PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


@pytest.mark.parametrize(
    "prompt",
    [
        "a cat",
        "",
        "two\nlines",
        "a cat\nNegative prompt: of mine",
        "Negative prompt: first",
        "a cat\nSteps: 3, Sampler: none",
        "Steps: 3",
        "ends in lines\n\n",
        "\n  begins late",
        'Ünïcödé "quotes", \\ colons: and {braces} \U0001f431',
        "a\rb\tc",
        "Prompt: x, Negative: y",
    ],
)
@pytest.mark.parametrize("negative", [None, "", "dog", "a\nNegative prompt: b\nSteps: 5", "blank lines\n\n"])
def test_prompts_survive(prompt: str, negative: str | None) -> None:
    text = compose(prompt, negative, PAIRS)
    got_prompt, got_negative, pairs = decompose(text)
    assert (got_prompt, got_negative) == (prompt, negative)
    assert pairs["Model"] == PAIRS["Model"]
    theirs = dict(THEIR_PAIR.findall(text.split("\n")[-1]))
    assert theirs["Steps"] == "20"
    assert json.loads(theirs["Model"]) == PAIRS["Model"]


def test_hires_fix_is_text_to_image_at_the_first_size() -> None:
    text = "a castle\nNegative prompt: fog\nSteps: 25, Sampler: DPM++ 2M, Schedule type: Automatic, CFG scale: 7, "
    text += "Seed: 3, Size: 512x768, Model hash: 0123456789, Model: m, Denoising strength: 0.6, Clip skip: 2, "
    text += "Hires upscale: 2, Hires steps: 10, Hires upscaler: Latent, Version: v1.10.1"
    settings = parse_parameters(text)
    assert "strength" not in settings
    assert settings["hires"]
    assert (settings["width"], settings["height"], settings["clip_skip"]) == (512, 768, 2)
    assert settings["schedule"] == "karras", "what AUTOMATIC1111 takes for this sampler"
    old = parse_parameters("a\nSteps: 2, Size: 1024x1536, Denoising strength: 0.7, First pass size: 512x768")
    assert (old["width"], old["height"], old["hires"]) == (512, 768, True)
    plain = parse_parameters("a\nSteps: 2, Size: 64x64, Denoising strength: 0.7, Mask blur: 8")
    assert (plain["strength"], plain["mask_blur"], plain["masked"]) == (0.7, 8, True)


def test_lines_after_the_settings_are_not_theirs() -> None:
    settings = parse_parameters("a cat\nNegative prompt:\nSteps: 7, Sampler: Euler a\nTemplate: a {cat|dog}")
    assert (settings["prompt"], settings["negative_prompt"], settings["steps"]) == ("a cat", "", 7)


@pytest.mark.parametrize(
    "line",
    [
        'a: "' * 250_000,
        'a: "b\\' * 160_000,
        "a " * 500_000,
        "a:" * 500_000,
        "," * 1_000_000,
        "a, b " * 200_000 + ":",
        '"' * 1_000_000,
        'a: "' + "\\" * 1_000_000,
    ],
    ids=range(8),
)
def test_a_megabyte_is_read_at_once(line: str) -> None:
    started = time.process_time()
    decompose("prompt\n" * 1000 + "Steps: 1, " + line)
    assert time.process_time() - started < 1


@pytest.mark.parametrize("line", ["Steps: many", "Steps: 1, Size: 5", "Steps: 1, Seed: " + "9" * 9999, "no settings"])
def test_values_of_the_wrong_kind(tmp_path: Path, line: str) -> None:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("parameters", "a cat\n" + line)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(GgufSdError, match=r"a\.png carries settings that cannot be read: ") as raised:
        read_parameters(tmp_path / "a.png")
    assert len(str(raised.value)) < 300


def test_jpegs_carry_their_settings_in_exif(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 8))
    exif = image.getexif()
    exif[0x8769] = {0x9286: b"UNICODE\0" + "a café\nSteps: 9, Seed: 4".encode("utf-16-be")}
    image.save(tmp_path / "a.jpg", exif=exif)
    settings = read_parameters(tmp_path / "a.jpg")
    assert (settings["prompt"], settings["steps"], settings["seed"]) == ("a café", 9, 4)
