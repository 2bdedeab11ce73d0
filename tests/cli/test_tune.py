"""`gguf-sd tune`, in Triton's interpreter, and `generate --tune`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gguf_sd.cli.main import main
from gguf_sd.runtime.tuning import Tuning
from gguf_sd_kernels.devices import Gpu
from gguf_sd_kernels.tuning import launch as launches
from gguf_sd_kernels.tuning import verdicts
from gguf_sd_kernels.tuning.cost import worth_measuring
from gguf_sd_kernels.tuning.launch import Measured, measured_entries
from gguf_sd_kernels.tuning.tuner import Event, Job


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """What would be checked and measured: a tuner that knows at once stands for the real one, which
    tests/kernels/tuning and tests/runtime show at work. It reaches all products but the last."""
    seen: list[Job] = []

    def run(self: Tuning, job: Job, device: torch.device) -> Iterator[Event]:
        seen.append(job)
        for subject in job.subjects:
            yield {"verdict": "", "subject": subject.to_json()}
        yield {"rates": [100.0, 500.0]}
        for use, _ in job.uses[:-1]:
            (launch, *_) = worth_measuring(use.product, Gpu("cpu", "mma", 4))
            yield {"measured": measured_entries({use.product: Measured(launch, 50.0, 80.0, 40.0)})[0]}

    monkeypatch.setattr(Tuning, "run", run)
    monkeypatch.setattr(verdicts, "_of", {})
    monkeypatch.setattr(launches, "_measured", {})
    monkeypatch.setenv(verdicts.SWITCH, "1")
    monkeypatch.setenv("GGUF_SD_CACHE", str(tmp_path))
    return seen


def test_the_table(jobs: list[Job], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["tune", "--device", "cpu", "--dtype", "float16", "--size", "64x64", "--quiet"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (job,) = jobs
    assert job.seconds == 45
    assert len(found["products"]) == len(job.uses) > 10
    measured = [row for row in found["products"] if "share" in row]
    assert len(measured) == len(found["products"]) - 1
    assert sum(row["share"] for row in measured) == pytest.approx(1)
    first = measured[0]
    operations = 2 * first["product"]["m"] * first["product"]["n"] * first["product"]["k"]
    assert first["tflops"] == pytest.approx(operations / 50e-6 / 1e12)
    assert first["mode"] == "fused"
    assert first["roofline"] >= first["tflops"] / 100
    assert found["milliseconds"] == pytest.approx(sum(row["count"] for row in measured) * 0.05)
    assert [path.parent.name for path in tmp_path.rglob("*cpu-triton*.json")].count("tables") == 1

    assert main([*arguments, "--seconds", "5", "--batch", "3"]) == 0
    assert jobs[1].seconds == 5
    assert {use.product.m for use, _ in jobs[1].uses} != {use.product.m for use, _ in job.uses}
    text = capsys.readouterr().out
    assert "reaches 100.0 TFLOP/s in a product and 500 GB/s in a copy" in text
    assert " 50.0us    80.0us    40.0us" in text
    assert f"{len(jobs[1].uses) - 1} of " in text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--size", "big"], "two numbers of pixels"),
        (["--size", "64x65"], "multiples of 8"),
        (["--batch", "0"], "--batch is 0"),
        (["--seconds", "soon"], "a number of seconds"),
        (["missing.gguf"], "missing.gguf does not exist"),
    ],
)
def test_bad_input(arguments: list[str], sentence: str, jobs: list[Job], capsys: Any) -> None:
    assert main(["tune", "--device", "cpu", *arguments]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
    assert jobs == []


def test_a_cpu_has_nothing_to_tune(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main(["tune", "--device", "cpu"]) == 2
    assert "tuning is for a GPU with Triton, and the device is cpu" in capsys.readouterr().err


def test_generate_on_a_cpu_tunes_nothing(jobs: list[Job], tmp_path: Path, capsys: Any) -> None:
    arguments = ["generate", "-p", "a red circle", "--device", "cpu", "--steps", "1", "--quiet"]
    assert main([*arguments, "-o", str(tmp_path / "a.png"), "--tune", "off"]) == 0
    assert main([*arguments, "-o", str(tmp_path / "b.png"), "--tune", "never"]) == 2
    assert "off; got 'never'" in capsys.readouterr().err
    assert jobs == []
