"""`generate` with a memory budget: what it shows, keeps to and refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from gguf_sd.cli.main import main
from gguf_sd_convert.convert import ConvertOptions, convert


@pytest.fixture(scope="module")
def model(tiny_pipeline: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("memory") / "tiny.gguf"
    convert(tiny_pipeline(), path, ConvertOptions(type="q8_0"))
    return path


def generate(model: Path, *more: str) -> int:
    size = ["--width", "32", "--height", "32", "--steps", "1", "--seed", "1", "--quiet", "--device", "cpu"]
    return main(["generate", str(model), "-p", "a cat", *size, *more])


@pytest.mark.parametrize(
    ("flag", "placed"), [("--medvram", "staged"), ("--offload-to-cpu", "staged"), ("--lowvram", "streamed")]
)
def test_a_plan_is_shown_and_nothing_painted(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str, placed: str
) -> None:
    output = tmp_path / "out.png"
    assert generate(model, "--plan", "--max-memory", "4GB", "-o", str(output)) == 0
    text = capsys.readouterr().out
    assert "budget     3.73 GiB" in text
    assert "stays loaded" in text
    assert generate(model, "--plan", "--json", "--max-vram", "4", flag, "-o", str(output)) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["budget"] == 4 << 30
    assert {plan["placement"]["text 0"], plan["placement"]["unet"]} == {placed}
    assert not output.exists()


def test_what_was_painted_by(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The plan, and the peak of this process, which has done other things before."""
    assert generate(model, "--json", "--lowvram", "-o", str(tmp_path / "out.png")) == 0
    memory = json.loads(capsys.readouterr().out)["memory"]
    assert memory["placement"]["unet"] == "streamed"
    assert 0 < memory["peak"] <= memory["budget"]
    assert memory["measured"] > 100 << 20


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--max-memory", "10MB"], "needs at least"),
        (["--max-memory", "1 bushel"], "--max-memory is '1 bushel'; it takes an amount of memory, such as 1GiB"),
        (["--lowvram", "--weights", "resident"], "leave --weights resident out"),
    ],
)
def test_what_cannot_be(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    output = tmp_path / "out.png"
    assert generate(model, *more, "-o", str(output)) == 2
    assert message in capsys.readouterr().err
    assert not output.exists()
