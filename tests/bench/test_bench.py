"""A whole comparison of two tiny models, its report, and going on after an interruption."""

from __future__ import annotations

import csv
import html
import json
import math
import random
import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gguf_sd.bench import plots, runner
from gguf_sd.bench.contestant import Task
from gguf_sd.bench.report import in_columns, write_report
from gguf_sd.bench.runner import Row
from gguf_sd.bench.spec import Contestant, Spec
from gguf_sd.cli import bench_spec
from gguf_sd.cli.main import main
from gguf_sd.demo import model_folder
from gguf_sd.demo.world import parse, render
from gguf_sd.errors import GgufSdError


def test_report_of_given_rows(tmp_path: Path) -> None:
    spec = Spec((
        Contestant("first", "a"), Contestant("second", "b")), ("a & b",), rounds=1, recorded={"k": "<v>"})  # fmt: skip
    for name, colour in (("first", "red"), ("second", "maroon")):
        (tmp_path / "runs" / f"{name}-0").mkdir(parents=True)
        Image.new("RGB", (64, 64), colour).save(tmp_path / "runs" / f"{name}-0" / "00000.png")
    rows = [
        Row("first", "gguf-sd", 100, 50, {"step_s": 1.0, "peak_rss": 5}),
        Row("second", "gguf-sd", 60, 20, {"step_s": 2.0, "peak_rss": 4, "psnr": 30.5}, {"psnr": 1.0},
            {"0-150": 0.1, "150-350": 0.05, "weighted": 0.07}),
    ]  # fmt: skip
    page = write_report(spec, rows, tmp_path).read_text()
    assert "30.50 ± 1.00" in page
    assert "&lt;v&gt;" in page
    assert page.count("data:image/png;base64,") == page.count("<h2>") == 4
    assert "the UNet's error is relative" in html.unescape(page)
    assert not re.search(r"(src|href)=.?http", page)
    found = list(csv.DictReader((tmp_path / "report.csv").open()))
    assert (found[1]["psnr"], found[1]["error_0-150"], found[0]["psnr"]) == ("30.5", "0.1", "")
    assert json.loads((tmp_path / "report.json").read_text())["rows"][1]["errors"]["weighted"] == 0.07
    write_report(spec, rows, tmp_path, timed=False)
    assert "step" not in (tmp_path / "report.csv").read_text()
    assert "step_s" not in (tmp_path / "report.json").read_text()


def test_quality_by_settings_that_pictures_take_in_turn(tmp_path: Path) -> None:
    """The second contestant paints half of what it does in one step wrong, and everything in two as the first does."""
    prompts = ("a red circle", "a red circle", "a blue ring", "a blue ring")
    settings = ({"steps": 1, "guidance": 0}, {"steps": 2, "guidance": 0}, {"steps": 9})
    spec = Spec((Contestant("first", "a"), Contestant("second", "b")), prompts, settings[:2], rounds=1)
    rows = [Row("first", "gguf-sd", 100, 50), Row("second", "gguf-sd", 60, 20)]
    for row, wrong in zip(rows, (None, 2), strict=True):
        (tmp_path / "runs" / f"{row.name}-0").mkdir(parents=True)
        for i, prompt in enumerate(spec.prompts):
            scene = parse("a yellow cross" if i == wrong else prompt)
            (picture,) = render([scene], random.Random(0))
            pixels = ((picture + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(tmp_path / "runs" / f"{row.name}-0" / f"{i:05}.png")
    for row, contestant in zip(rows, spec.contestants, strict=True):
        runner._quality(spec, tmp_path, contestant, row)
    assert rows[0].by_settings == {"1 step": {"correct": 1}, "2 steps": {"correct": 1}}
    one, two = rows[1].by_settings.values()
    assert (one["correct"], two) == (0.5, {"psnr": math.inf, "correct": 1})
    page = write_report(spec, rows, tmp_path).read_text()
    for text in (page, (tmp_path / "report.md").read_text(), in_columns(spec, rows, True, 200)):
        assert "1 step" in text
        assert "guidance 0" not in text, "as with all"
        assert "equal, 100.0% correct" in text
    written = json.loads((tmp_path / "report.json").read_text())["rows"][1]["by_settings"]
    assert written["2 steps"] == {"psnr": "equal", "correct": 1}
    few = replace(spec, settings=settings)
    runner._quality(few, tmp_path, few.contestants[0], row := Row("first", "gguf-sd", 100, 50))
    assert list(row.by_settings) == ["1 step, guidance 0", "2 steps, guidance 0", "9 steps"]


def test_plots_leave_out_what_all_names_begin_with() -> None:
    def names(*given: str) -> list[str]:
        return plots.short_names([Row(name, "gguf-sd", 0, 0) for name in given])

    assert names("my-model-f16", "my-model-q4_0", "my-model-q4_1") == ["f16", "q4_0", "q4_1"]
    assert names("model-q4_0", "model-q4_0+calibrated") == ["q4_0", "q4_0+calibrated"]
    assert names("a-f16", "b-f16") == ["a-f16", "b-f16"]
    assert names("alone-f16") == ["alone-f16"]


def test_the_table_fits_the_terminal() -> None:
    spec = Spec((Contestant("first", "a"), Contestant("second", "b")), ("a", "b"), rounds=1)
    rows = [
        Row("first", "gguf-sd", 2 * 10**6, 10**6, {"step_s": 1.5}),
        Row("second", "gguf-sd", 10**6, 10**6, {"step_s": 1.25, "psnr": 30.5}, {"psnr": 1.0}),
    ]
    wide = in_columns(spec, rows, True, 200)
    assert wide.splitlines()[:3] == [
        "contestant  file, MB  UNet, MB  step, s      PSNR, dB",
        "first           2.00      1.00   1.5000              ",
        "second          1.00      1.00   1.2500  30.50 ± 1.00",
    ]
    narrow = in_columns(spec, rows, True, 36).splitlines()
    assert max(map(len, narrow)) <= 36
    assert [line.split()[0] for line in narrow if line][:6] == ["contestant", "first", "second"] * 2
    assert "step, s" not in in_columns(spec, rows, False, 200)
    told = " ".join(wide.split())
    assert "2 prompts, seeds 0 … 1, a fresh process for every contestant." in told
    assert "UNet's error" not in told, "of which there is none"


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--width", "63"], "width 63 is no multiple of 8"),
        (["--dtype", "float8"], "unknown dtype 'float8'"),
        (["--types", "f16,mixed@3"], "bpw is 3"),
        (["--types", "f16,f16"], "two contestants are called 'model-f16'"),
        (["--types", ""], "'' is no type"),
        (["--steps", "0"], "steps is 0"),
        (["--preset", "fast"], "no preset 'fast'; choose from quick, model, sd15-card, turbo"),
    ],
)
def test_what_cannot_be_painted_is_told_before_any_work(
    words: list[str], complaint: str, tmp_path: Path, capsys: Any
) -> None:
    assert main(["bench", str(model_folder()), "-o", str(tmp_path / "out"), *words]) == 2
    assert complaint in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_models_of_one_name_are_told_apart() -> None:
    assert bench_spec._names([Path("/a/x.gguf"), Path("/b/y.gguf")]) == ["x", "y"]
    assert bench_spec._names([Path("/a/model"), Path("/b/model"), Path("/b/y.gguf")]) == ["a-model", "b-model", "b-y"]


def test_the_first_contestant_records_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls that another comparison left in the folder are not taken for this one's."""
    task = Task("m", "gguf-sd", [], str(tmp_path / "run"), calls=str(tmp_path / "calls"), record=True)
    (tmp_path / "calls").write_text("another's")
    done = subprocess.CompletedProcess([], 1, "", "Traceback …\nno weights")
    monkeypatch.setattr(runner.subprocess, "run", lambda *args, **settings: done)
    with pytest.raises(GgufSdError, match=r"one \(gguf-sd\) failed: no weights"):
        runner._run(task, Contestant("one", "m"))
    assert not (tmp_path / "calls").exists()


def test_a_contestant_says_what_is_wrong_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    task = Task(str(tmp_path / "x.gguf"), "gguf-sd", [], str(tmp_path / "run"))
    with pytest.raises(GgufSdError, match=r"failed: .*x\.gguf (is|ends)") as raised:
        runner._run(task, Contestant("one", "m"))
    assert "errors.GgufSdError" not in str(raised.value)


@pytest.mark.slow
def test_a_comparison_and_going_on(
    tiny_pipeline: Callable[..., Path], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = tiny_pipeline(unet={"sample_size": 8}), tmp_path / "report"
    command = ["bench", str(folder), "--types", "f16,q4_0", "--count", "3", "--rounds", "2", "--preset", "quick"]
    command += ["--dtype", "float32", "--peers", "diffusers", "-o", str(out), "--json", "--quiet"]
    assert main(command) == 0
    rows = {row["name"].rpartition("-")[2]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["diffusers"]["values"]["psnr"] > 45, "the same model in another program"
    assert 10 < rows["q4_0"]["values"]["psnr"] < rows["diffusers"]["values"]["psnr"]
    assert 0 < rows["q4_0"]["errors"]["weighted"] < 1
    assert all(row["values"]["step_s"] > 0 and row["values"]["peak_rss"] > 1e8 for row in rows.values())
    assert rows["q4_0"]["unet_bytes"] < rows["f16"]["unet_bytes"]

    again: list[str] = []
    real = runner._run

    def run(task: Task, contestant: Contestant) -> None:
        again.append(task.folder)
        real(task, contestant)

    monkeypatch.setattr(runner, "_run", run)
    next((out / "runs").glob("*q4_0-1")).joinpath("result.json").unlink()
    assert main([*command, "--resume"]) == 0
    assert [Path(path).name.rpartition("-")[2] for path in again] == ["1"]

    assert main(["bench", str(out / "bench.toml"), "-o", str(tmp_path / "second"), "--quiet", "--json"]) == 0
    pairs = [sorted((path / "runs").rglob("*.png")) for path in (out, tmp_path / "second")]
    assert [a.read_bytes() for a in pairs[0]] == [b.read_bytes() for b in pairs[1]]

    alone = tmp_path / "alone" / "bench.toml"  # without the models, which are made again
    alone.parent.mkdir()
    alone.write_bytes((out / "bench.toml").read_bytes())
    assert main(["bench", str(alone), "-o", str(tmp_path / "third"), "--quiet", "--json"]) == 0
    third = sorted((tmp_path / "third" / "runs").rglob("*.png"))
    assert [a.read_bytes() for a in pairs[0]] == [b.read_bytes() for b in third]


def test_layers_of_what_is_quantised_already_are_refused(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "q8_0.gguf"
    assert main(["convert", str(model_folder()), "-o", str(path), "--quiet"]) == 0
    assert main(["bench", "layers", str(path), "-o", str(tmp_path / "layers")]) == 2
    assert "is quantised already, to Q8_0; measure the original" in capsys.readouterr().err
    assert not (tmp_path / "layers").exists()


@pytest.mark.slow
def test_layers(tiny_pipeline: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    assert main(["bench", "layers", str(tiny_pipeline(unet={"sample_size": 8})), "-o", str(tmp_path), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    errors = [row["errors"]["Q4_0"] for row in rows]
    assert errors == sorted(errors, reverse=True)
    assert all(row["errors"]["Q8_0"] < 0.02 * row["errors"]["Q4_0"] for row in rows)
    assert any(len(row["layers"]) == 3 for row in rows), "queries, keys and values share a type"
    assert (tmp_path / "layers.png").stat().st_size > 1000
