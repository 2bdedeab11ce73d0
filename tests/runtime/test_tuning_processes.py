"""The tuner in whole processes: two of them at once, and one whose kernels hang past their time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gguf_sd_kernels.tuning.tables import read_table

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("tuning_process.py")


def start(folder: Path, seconds: float, fault: str = "", kernel: str = "") -> subprocess.Popen[str]:
    paths = os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "convert"))
    environment = os.environ | {"PYTHONPATH": paths, "FAULT": fault, "FAULTY": kernel}
    environment |= {"TRITON_INTERPRET": "1", "GGUF_SD_SELF_CHECK": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(folder), str(seconds)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def end(process: subprocess.Popen[str]) -> tuple[dict[str, Any], str]:
    """(what it found, what it warned of)."""
    out, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    found: dict[str, Any] = json.loads(out)
    return found, errors


@pytest.mark.slow
def test_two_processes_tune_at_once(tmp_path: Path) -> None:
    """Each paints the right picture, and leaves a table and verdicts that the next one reads."""
    for process in [start(tmp_path, 5) for _ in range(2)]:
        found, _ = end(process)
        assert found["error"] < 1e-2
        assert found["measured"] > 0
    (table,) = (tmp_path / "tables").iterdir()
    assert read_table(table)[1], "the model counts as tuned"
    (checks,) = (tmp_path / "checks").iterdir()
    assert len(json.loads(checks.read_text())["checks"]) > 5
    found, _ = end(start(tmp_path, 5, "crash", "linear_kernel"))  # which would be warned of, were anything tried again
    assert found["error"] < 1e-2
    assert {"linear_kernel", "dequantize_kernel"} & set(found["ran"]), "whichever was faster in the interpreter"


@pytest.mark.slow
def test_a_kernel_that_hangs_is_done_without(tmp_path: Path) -> None:
    """Each launch of it that the step would run is given up after its time, and named; another way gives the same."""
    found, warned = end(start(tmp_path, 0, "hang", "conv_kernel"))
    assert found["error"] < 1e-2
    assert "is not used on this GPU: it hangs: nothing came of it in 10 s" in warned
    (checks,) = (tmp_path / "checks").iterdir()
    reasons = [check["reason"] for check in json.loads(checks.read_text())["checks"]]
    assert reasons.count("") > 5
    assert any(reason.startswith("it hangs") for reason in reasons)
