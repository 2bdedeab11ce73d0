"""`gguf-sd demo`, and the built-in model as the default of `generate`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from gguf_sd.cli.demo import _check_files
from gguf_sd.cli.main import main
from gguf_sd.demo.check import judge
from gguf_sd.demo.models import DEMO_MODELS
from gguf_sd.demo.world import parse


def test_table_and_sheet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "-o", str(tmp_path / "demo"), "--pictures", "6", "--quiet", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    rows = report["types"]
    assert [row["type"] for row in rows] == ["f16", "q8_0", "q4_1", "q4_0"]
    sizes = [row["unet_bytes"] for row in rows]
    assert sizes == sorted(sizes, reverse=True)
    assert all(row["file_bytes"] == (tmp_path / "demo" / f"demo-{row['type']}.gguf").stat().st_size for row in rows)
    assert rows[0]["psnr"] is None
    assert rows[1]["psnr"] > rows[2]["psnr"] >= rows[3]["psnr"]
    assert rows[0]["correct"] == 1
    _check_files(tmp_path / "demo", DEMO_MODELS["sd"])  # a second run may replace them
    assert Image.open(report["sheet"]).size == (4 * 140 + 202, 6 * 140 + 64)


@pytest.mark.parametrize("name", ["sheet.png", "demo-q4_0.gguf"])
def test_files_of_others_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    (tmp_path / name).write_text("mine")
    assert main(["demo", "-o", str(tmp_path), "--pictures", "6", "--quiet"]) == 2
    assert f"{name} exists and is not of an earlier demo" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"


def test_too_few_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "-o", str(tmp_path), "--pictures", "2"]) == 2
    assert "--pictures is 2; the sheet shows 6" in capsys.readouterr().err


def test_generate_without_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GGUF_SD_CACHE", str(tmp_path / "cache"))
    prompt = "a green square above a red circle"
    assert main(["generate", "-p", prompt, "--seed", "1", "-o", str(tmp_path / "out.png"), "--quiet"]) == 0
    assert judge(Image.open(tmp_path / "out.png"), parse(prompt)).all
