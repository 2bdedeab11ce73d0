"""`generate --resume`: what an earlier run has finished is kept, the rest is the same bytes as without interruption."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gguf_sd.cli.main import main
from gguf_sd.imaging.png_metadata import read_parameters
from gguf_sd.imaging.save_png import save_png
from gguf_sd.pipeline import Pipeline
from gguf_sd.request import MAX_SEED

SIZE = ["--steps", "1", "--width", "32", "--height", "32", "--device", "cpu", "--safety", "off", "--quiet"]
PROMPT = ["-p", "a cat", "-o", "x.png"]


@pytest.fixture
def run(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: main(["generate", str(tiny_model), *SIZE, *arguments])


def there(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_ino, path.read_bytes()) for path in sorted(folder.iterdir())}


def painted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the batches that are painted from now on."""
    sizes: list[int] = []
    real = Pipeline._paint

    def noted(self: Pipeline, batch: Any, *given: Any) -> Any:
        sizes.append(len(batch))
        return real(self, batch, *given)

    monkeypatch.setattr(Pipeline, "_paint", noted)
    return sizes


@pytest.mark.parametrize("lost", [(3,), (1, 4, 5), (5,), ()])
def test_the_rest_is_painted(
    run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: tuple[int, ...]
) -> None:
    command = [*PROMPT, "--seed", "7", "--count", "5", "--batch", "2"]
    assert run(*command) == 0
    whole = there(tmp_path)
    for number in lost:
        (tmp_path / f"x-{number}.png").unlink()
    sizes = painted(monkeypatch)
    assert run(*command, "--resume") == 0
    now = there(tmp_path)
    assert {name: data for name, (_, data) in now.items()} == {name: data for name, (_, data) in whole.items()}
    kept = {name for name in whole if now[name][0] == whole[name][0]}
    assert kept >= {f"x-{number}.png" for number in range(1, 6) if number not in lost}
    batches = [(1, 2), (3, 4), (5,)]
    assert sizes == [len(batch) for batch in batches if set(batch) & set(lost)], "whole batches, and no more"


def test_a_seed_that_was_drawn_goes_on(run: Callable[..., int], tmp_path: Path) -> None:
    assert run(*PROMPT, "--count", "4") == 0
    whole = there(tmp_path)
    for number in (1, 4):
        (tmp_path / f"x-{number}.png").unlink()
    assert run(*PROMPT, "--count", "4", "--resume", "--seed", "-1") == 0
    assert {name: data for name, (_, data) in there(tmp_path).items()} == {n: data for n, (_, data) in whole.items()}
    assert run(*PROMPT, "--count", "6", "--resume") == 0
    seeds = [read_parameters(tmp_path / f"x-{number}.png")["seed"] for number in range(1, 7)]
    assert seeds == list(range(seeds[0], seeds[0] + 6))
    last = [*PROMPT[:-1], "y.png", "--count", "2"]
    assert run(*last, "--seed", str(MAX_SEED)) == 0, "seeds begin again behind the last"
    (tmp_path / "y-1.png").unlink()
    assert run(*last, "--resume") == 0
    assert read_parameters(tmp_path / "y-1.png")["seed"] == MAX_SEED


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        (["-p", "a dog"], "the prompt 'a cat'"),
        (["-n", "dog", "--guidance", "3"], "no negative prompt"),
        (["--steps", "2"], "Steps '1' where now '2'"),
        (["--sampler", "euler"], "Sampler 'PLMS' where now 'Euler'"),
        (["--seed", "8"], "Seed '7' where now '8'"),
        (["--width", "64"], "Size '32x32' where now '64x32'"),
        (["--clip-skip", "2"], "Clip skip"),
        (["--dtype", "bfloat16"], "Precision 'float32' where now 'bfloat16'"),
    ],
)
def test_other_settings_are_told(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], changed: list[str], sentence: str
) -> None:
    command = [*PROMPT, "--seed", "7", "--count", "2", "--dtype", "float32"]
    assert run(*command) == 0
    before = there(tmp_path)
    capsys.readouterr()
    assert run(*command, *changed, "--resume") == 2
    said = capsys.readouterr().err
    assert "x-1.png was painted with other settings, " in said
    assert sentence in said
    assert len(said.splitlines()) == 1
    assert there(tmp_path) == before


def test_what_is_no_finished_picture(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that is damaged is painted again; a stranger's is refused; without a name there is nothing to go on with."""
    command = [*PROMPT, "--seed", "7", "--count", "2", "--resume"]
    assert run(*command) == 0, "of nothing: all are painted"
    whole = there(tmp_path)
    file = tmp_path / "x-2.png"
    file.write_bytes(file.read_bytes()[:-40])
    assert run(*command) == 0
    assert file.read_bytes() == whole["x-2.png"][1]
    for text in ("Steps: 1, Version: gguf-sd 9", "a cat\nVersion: gguf-sd 9"):
        save_png(Image.new("RGB", (8, 8)), file, {"parameters": text})
        assert run(*command) == 2
        assert "x-2.png was painted with other settings" in capsys.readouterr().err
    save_png(Image.new("RGB", (8, 8)), file, {"parameters": "a cat\nSteps: 1, Version: other"})
    assert run(*command) == 2
    assert "x-2.png exists and is no picture of gguf-sd's" in capsys.readouterr().err
    assert run("-p", "a cat", "--resume") == 2
    assert "--resume goes on with the pictures of --output" in capsys.readouterr().err


def test_all_there_paints_nothing(
    run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*PROMPT, "--seed", "7", "--count", "2"]
    assert run(*command) == 0
    sizes = painted(monkeypatch)
    capsys.readouterr()
    assert run(*command, "--resume", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["files"] == []
    assert told["kept"] == ["x-1.png", "x-2.png"]
    assert sizes == []
