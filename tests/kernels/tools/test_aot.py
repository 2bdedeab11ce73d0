"""Kernels compile for GPUs that are not here: a sample of what ``python -m gguf_sd_kernels.tools.aot`` compiles."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gguf_sd_kernels.tools import aot

triton = pytest.importorskip("triton")
SPILLS_NOT_IN = "3.7."
SAMPLE = 45  # of all, five kernels on each target; about 1 s each on one core


def test_a_sample_compiles_for_every_target(tmp_path: Path) -> None:
    """In a process of its own: this one may run Triton's interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[3] / "kernels")
    command = [sys.executable, "-m", "gguf_sd_kernels.tools.aot", "--processes", "2"]
    command += ["--sample", str(SAMPLE), "--json", str(tmp_path / "aot.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (tmp_path / "aot.json").exists(), done.stdout + done.stderr
    built = json.loads((tmp_path / "aot.json").read_text())
    # Another Triton shares out registers otherwise, and a launch may spill a little.
    faults = [f for b in built for f in b["faults"] if triton.__version__.startswith(SPILLS_NOT_IN) or "stack" not in f]
    assert not faults, done.stdout
    assert done.returncode == any(b["faults"] for b in built)
    assert len(built) == SAMPLE
    assert len({b["target"] for b in built}) == 9
    products = [b for b in built if b["case"].startswith(("linear", "conv", "int8 linear", "int8 conv"))]
    assert any(b["case"].startswith("int8 conv") for b in products)
    assert all(b["loop_matrix"] for b in products)


def test_a_summary_has_a_line_for_each_target(tmp_path: Path) -> None:
    def built(target: str, registers: int, *faults: str) -> aot.Built:
        return aot.Built("linear", target, registers, 1024, 0, 10, 5, 1, faults)

    aot.summarise([built("90", 100), built("80", 7)], tmp_path / "aot.json")
    aot.summarise([built("90", 60, "no HGMMA"), built("90", 80)], tmp_path / "aot.json")
    lines = json.loads((tmp_path / "aot.json").read_text())
    found = {target: (line["compiled"], line["with_faults"], line["most_registers"]) for target, line in lines.items()}
    assert found == {"80": (1, 0, 7), "90": (2, 1, 80)}


def test_no_summary_of_a_part(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["aot", "--sample", "1", "--summary", "x.json"])
    with pytest.raises(SystemExit):
        aot.main()
    assert "--summary is of whole targets" in capsys.readouterr().err
