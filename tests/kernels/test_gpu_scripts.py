"""The scripts for a GPU machine run, here in Triton's interpreter, and know the models' true shapes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]


def run(*command: str) -> str:
    folders = [str(ROOT / folder) for folder in (".", "kernels", "convert", "benchmarks")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_shapes_are_the_models() -> None:
    """Multiply-accumulates of a step, 10^9: of products with quantised weights, and all."""
    heads = [
        line for line in run(str(ROOT / "benchmarks/shapes.py")).splitlines() if "GMAC" in line and "shapes" in line
    ]
    assert [head.split(", ")[-1] for head in heads] == ["677 of 803 GMAC", "767 of 794 GMAC", "2988 of 3381 GMAC"]


def test_check_gpu(tmp_path: Path) -> None:
    few = ["--device", "cpu", "--processes", "0", "--seconds", "4", "--json", str(tmp_path / "c.json")]
    run(str(ROOT / "benchmarks/check_gpu.py"), *few)
    found = json.loads((tmp_path / "c.json").read_text())
    assert found["wrong"] == []
    assert found["failures"] == {}
    assert found["comparisons"] > 5


def test_bench_kernels(tmp_path: Path) -> None:
    files = ["--json", str(tmp_path / "k.json"), "--auto", str(tmp_path / "auto.json")]
    one = ["--workload", "sdxl-512", "--only", "linear 1x320x1280", "--qtype", "Q8_0"]
    run(str(ROOT / "benchmarks/bench_kernels.py"), "--device", "cpu", *one, *files)
    (entry,) = json.loads((tmp_path / "auto.json").read_text())["products"]
    assert entry["product"] == {"op": "linear", "qtype": "Q8_0", "m": 1, "n": 320, "k": 1280, "taps": 1}
    assert json.loads((tmp_path / "k.json").read_text())["complete"]
