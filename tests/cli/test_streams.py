"""Streams that are closed, full or know no more than ASCII, and arguments that are no Unicode."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gguf_sd.cli.main import main
from gguf_sd.imaging.png_metadata import read_parameters
from gguf_sd.imaging.save_png import save_png

pytestmark = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a shell and /dev/full")
CAFE = os.fsdecode(b"caf\xe9.gguf")  # Latin-1, as on old disks
PLAIN = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.fixture(scope="module")
def model(tiny_pipeline: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("streams") / CAFE
    assert main(["convert", str(tiny_pipeline()), "-o", str(path), "--type", "q8_0", "--quiet"]) == 0
    return path


def shell(command: str, folder: Path, model: Path, **environment: str) -> tuple[int, str, str]:
    """Exit code, output and errors of a shell's command line, in which `sd` is gguf-sd and $M the model."""
    every = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "M": str(model)} | environment
    script = f'sd() {{ "{sys.executable}" -m gguf_sd "$@"; }}\n{command}'
    done = subprocess.run(["bash", "-c", script], capture_output=True, cwd=folder, env=every, timeout=100)
    return done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace")


FULL = "gguf-sd: cannot write the output: No space left on device\n"


@pytest.mark.parametrize(
    ("command", "code", "error"),
    [
        ('sd inspect "$M" > /dev/full', 2, FULL),
        ("sd --help > /dev/full", 2, FULL),
        ("sd generate --help > /dev/full", 2, FULL),
        ('sd inspect "$M" <&- >&- 2>&-', 0, ""),
        ("sd inspect nope.gguf >&-", 2, "gguf-sd: cannot read nope.gguf: No such file or directory\n"),
        ("sd inspect nope.gguf 2> /dev/full", 2, ""),
        ("sd inspect nope.gguf 2>&-", 2, ""),
        ('sd inspect "$M" | head -1 > /dev/null; exit ${PIPESTATUS[0]}', None, ""),
    ],
)
def test_streams_that_take_nothing(model: Path, tmp_path: Path, command: str, code: int | None, error: str) -> None:
    got, _, said = shell(command, tmp_path, model)
    assert said == error
    assert got == code or (code is None and got in (0, 141))


def test_a_closed_stream_is_no_file_of_ours(model: Path, tmp_path: Path) -> None:
    """Without care the picture would be opened as number 1 or 2, and what libraries print would land in it."""
    paint = 'sd generate "$M" -p a --steps 1 --width 32 --height 32 --quiet -o x.png'
    assert shell(f"{paint} >&- 2>&-", tmp_path, model)[0] == 0
    assert Image.open(tmp_path / "x.png").size == (32, 32)
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


@pytest.mark.parametrize("environment", [{}, PLAIN, {"PYTHONIOENCODING": "ascii"}])
def test_names_and_texts_that_a_terminal_cannot_show(model: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    code, output, error = shell('sd inspect "$M"', tmp_path, model, **environment)
    assert (code, error) == (0, "")
    assert "\\udce9.gguf" in output
    assert "…" in output or "\\u2026" in output
    code, output, error = shell('sd inspect "$M" --json', tmp_path, model, **environment)
    assert json.loads(output)["file"].endswith("caf\udce9.gguf")
    code, output, error = shell("sd inspect nöpe.gguf", tmp_path, model, **environment)
    assert code == 2
    assert error.startswith("gguf-sd: cannot read n")
    assert error.count("\n") == 1


def test_a_picture_is_not_lost_for_the_name_of_its_model(tmp_path: Path) -> None:
    text = f"a cat\nSteps: 3, Model: {os.fsdecode(os.fsencode(CAFE))[:-5]}, Version: gguf-sd 0.1"
    save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", {"parameters": text})
    settings: dict[str, Any] = read_parameters(tmp_path / "a.png")
    assert (settings["prompt"], settings["steps"], settings["model"]) == ("a cat", 3, "caf\\udce9")


@pytest.mark.parametrize(
    "command",
    [
        ["inspect", "{}"],
        ["convert", "{}", "-o", "x.gguf"],
        ["generate", "{}", "-p", "a"],
        ["generate", "{model}", "-p", "a", "--vae", "{}"],
        ["generate", "{model}", "-p", "a", "--tokenizer", "{}", "--quiet"],
        ["generate", "{model}", "--from", "{}"],
        ["generate", "{model}", "-p", "a", "--init-image", "{}"],
    ],
)
def test_a_pipe_keeps_nobody_waiting(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert main([part.format("pipe", model=model) for part in command]) == 2
    assert "pipe is" in capsys.readouterr().err
