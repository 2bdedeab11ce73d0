"""The scripts for a GPU machine run, here on tiny sizes in Triton's interpreter, and tell right from wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
FOLDERS = [str(ROOT / folder) for folder in (".", "kernels", "convert")]


@pytest.fixture
def on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts can be imported."""
    for folder in FOLDERS:
        monkeypatch.syspath_prepend(folder)


def run_on_gpu(results: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    variables = {"DEVICE": "cpu", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | variables
    command = ["bash", str(BENCHMARKS / "gpu" / "on_gpu.sh"), str(results)]
    return subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)


@pytest.mark.slow
def test_a_whole_run(tmp_path: Path) -> None:
    # The check is cut short; the others end long before, on a busy machine too.
    limits = {
        "CHECK_SECONDS": "6",
        "KERNELS_SECONDS": "120",
        "TUNE_SECONDS": "40",
        "PICTURE_SECONDS": "120",
        "STREAM_SECONDS": "120",
        "STEP_SECONDS": "120",
    }
    folder = tmp_path / "results"
    done = run_on_gpu(folder, **limits)
    assert done.returncode == 0, done.stdout + done.stderr
    names = {"results.json", "summary.txt", "log.txt", "auto.json", "pictures.png"}
    assert {path.name for path in folder.iterdir()} == names
    assert done.stdout == (folder / "log.txt").read_text()
    summary = (folder / "summary.txt").read_text()
    assert summary in done.stdout
    for line in (
        "part step: done",
        "fused at least as fast as dequantize",
        "not measured: Q4_0 step",
        "for mode auto to go by",
    ):
        assert line in summary
    found = json.loads((folder / "results.json").read_text())
    assert list(found["parts"]) == ["machine", "check", "kernels", "tune", "picture", "stream", "step"]
    check, kernels = found["check"], found["kernels"]
    assert (check["wrong"], check["failures"]) == ([], {})
    assert check["comparisons"] > 2
    assert "left out: " in "\n".join(check["summary"]), "it was given 6 seconds"
    (entry,) = json.loads((folder / "auto.json").read_text())["products"]
    assert entry["product"] == {"op": "linear", "qtype": "Q8_0", "m": 1, "n": 160, "k": 128, "taps": 1}
    assert kernels["complete"]
    assert 0 < kernels["products"][0]["int8_error"] < 2e-2
    assert found["tune"]["set_aside"] == {}
    assert any("share" in row for row in found["tune"]["products"])
    assert "kernels agree with plain torch, 0 are set aside" in summary
    assert found["picture"]["psnr"]["torch"][0] > 35
    stream = found["stream"]["streams"]["tiny Q4_0"]
    assert stream["equal"]
    assert stream["step_bytes"] > 100_000
    step = found["step"]["steps"]["tiny Q4_0"]
    assert {"fused", "fused graph", "torch", "torch graph"} <= step["ms"].keys()
    assert step["errors"]["fused graph against fused"] == 0
    assert all(step["finite"].values())
    assert 0 < step["memory"]["fused"]["weights"] < step["memory"].get("diffusers", {"weights": 1e9})["weights"]
    assert step["profile"]["device_ms"] is None


def test_failed_parts_are_counted(tmp_path: Path) -> None:
    stub = tmp_path / "python"
    stub.write_text(
        f'#!/bin/sh\ncase "$1 $2" in\n-c* | *.report) exec {sys.executable} "$@" ;;\n'
        "*.check_gpu | *.bench_step) exit 3 ;;\nesac\n"
    )
    stub.chmod(0o755)
    done = run_on_gpu(tmp_path / "results", PYTHON=str(stub))
    assert done.returncode == 2, done.stdout + done.stderr
    text = (tmp_path / "results/summary.txt").read_text()
    assert "part check: FAILED" in text
    assert "part kernels: done" in text


def test_a_wrong_kernel_fails_the_check(
    on_path: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks.gpu import check_gpu
    from gguf_sd_kernels.triton import norm as triton_norm

    real = triton_norm.layer_norm_triton
    monkeypatch.setattr(triton_norm, "layer_norm_triton", lambda *args: 1.1 * real(*args))
    path = tmp_path / "check.json"
    options = ["--device", "cpu", "--processes", "0", "--only", "norms", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", ["check_gpu.py", *options])
    with pytest.raises(SystemExit) as ended:
        check_gpu.main()
    assert ended.value.code == 1
    found = json.loads(path.read_text())
    assert {result["name"].split()[0] for result in found["wrong"]} == {"layer"}
    assert found["targets"][0]["met"] is False
    assert "WRONG layer norm" in capsys.readouterr().out


def test_every_kind_of_check(on_path: None) -> None:
    """One of each, and every kind of product."""
    from benchmarks.gpu.check_gpu import all_jobs
    from benchmarks.lib.kernel_checks import run_job

    jobs: dict[tuple[str, str], Any] = {}
    for job in all_jobs(torch.device("cpu"), ("Q4_1",)):
        op = job.arguments[1].op if job.check == "product" else ""
        jobs.setdefault((job.check, op), job)
    assert {check for check, _ in jobs} == {"dequantize", "norms", "launch", "ptx", "unet", "sizes", "product"}
    for job in jobs.values():
        results = run_job(job)
        assert results, job
        assert all(result.ok for result in results), results


def test_jobs_that_die_take_nothing_else(on_path: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pool_work.py").write_text(
        "import os, time\n\n\ndef work(job):\n    if job == 'die':\n        os._exit(3)\n    if job == 'hang':\n"
        "        time.sleep(60)\n    return 1 / job\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    from pool_work import work  # type: ignore[import-not-found]

    from benchmarks.lib.deadline import Deadline
    from benchmarks.lib.worker_pool import Failure, run_jobs

    found = dict(run_jobs([1, "die", 2, "hang", 0, 4], work, 2, Deadline(120), job_seconds=10))
    assert (found[1], found[2], found[4]) == (1.0, 0.5, 0.25)
    assert found["die"] == Failure("the process died, exit code 3")
    assert found["hang"] == Failure("not done after 10 s")
    assert "ZeroDivisionError" in found[0].reason
    assert dict(run_jobs([1], work, 2, Deadline(0))) == {}


def test_shapes_are_the_models(on_path: None) -> None:
    """Multiply-accumulates of a step, 10^9: of products with quantised weights, and all."""
    from benchmarks.lib.shapes import WORKLOADS, step_gmac, step_layers

    def quantised(name: str) -> float:
        return sum(layer.gmac * count for layer, count in step_layers(WORKLOADS[name]).items())

    found = {name: (round(quantised(name)), round(step_gmac(work))) for name, work in WORKLOADS.items()}
    assert found == {"sd15-512": (677, 803), "sdxl-512": (767, 794), "sdxl-1024": (2988, 3381)}


def test_copies_are_told_from_convolutions(on_path: None) -> None:
    from collections import Counter

    from benchmarks.gpu.profile_step import breakdown

    times = Counter(
        {
            "sm90_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc_tilesize128x128x64": 600.0,
            "conv_kernel": 200.0,
            "void cudnn::ops::nchwToNhwcKernel<__half, __half, float, false, true>": 60.0,
            "void at::native::elementwise_kernel<128, 4, at::native::direct_copy_kernel_cuda(...)>": 30.0,
            "Memcpy DtoD (Device -> Device)": 10.0,
            "void at::native::(anonymous namespace)::CatArrayBatchedCopy_aligned16_contig<...>": 100.0,
        }
    )
    found = breakdown(times)
    assert (found["device_ms"], found["copies_share"], found["concatenations_share"]) == (1.0, 0.1, 0.1)


def test_targets(on_path: None) -> None:
    from benchmarks.lib.step_report import targets

    def entry(ratio: float, nbytes: int, copies: float) -> dict[str, Any]:
        return {
            "times_as_fast_as_diffusers": {"auto graph": ratio},
            "memory": {"fused": {"weights": nbytes}},
            "profile": {"copies_share": copies},
            "finite": {"fused": True},
        }

    steps = {"sd15-512 Q4_0": entry(1.4, 490_000_000, 0.0), "sdxl-512 Q4_0": entry(1.2, 1_460_000_000, 0.05)}
    assert [target["met"] for target in targets(steps)] == [False, True, False, True]
    del steps["sdxl-512 Q4_0"]
    assert [target["met"] for target in targets(steps)] == [True, True, True, True]
    assert [target["met"] for target in targets({})] == [None] * 4
