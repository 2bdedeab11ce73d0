"""A sample of what ``python -m gguf_sd_kernels.tools.emulate`` executes, where GGUF_SD_EMULATOR names a checkout of
tinygrad; what stands around the emulator is tested anywhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gguf_sd.errors import GgufSdError
from gguf_sd.runtime.kernel_modes import choose_kernels
from gguf_sd_kernels import devices
from gguf_sd_kernels.devices import INTERPRETER, Gpu, gpu_of
from gguf_sd_kernels.tools.emulate import Executed, earlier, versions
from gguf_sd_kernels.tools.emulate_cases import Case, cases, random_blocks
from gguf_sd_kernels.tools.emulator import Emulator
from gguf_sd_kernels.tuning.launch import UNTUNED, Launch

pytest.importorskip("triton")
ROOT = Path(__file__).parents[3]
EMULATOR = os.environ.get("GGUF_SD_EMULATOR")
# One launch of each kind; about two minutes in all, most of it compiling the emulated instructions.
SAMPLE = (
    "geglu Q4_1 fp16 32x64x32 8w 2s split",
    "geglu normed Q4_0 fp16 32x64x32 8w 2s split",
    "linear measured Q8_0 bf16 32x64x32 8w 2s 53",
    "conv 3x3 Q8_0 fp16 32x64x64 8w 2s 2x64",
    "conv enlarged Q4_1 fp16 32x64x32 8w 2s 54",
    "int8 linear Q8_0 fp16 32x64x32 4w 2s 53",
    "dequantize Q4_1 bf16 64 blocks 4w 37",
    "group norm silu fp16 2x64",  # in halves, and whole
    "layer norm fp16 5x320",
    "quantize bf16",
)


def sampled() -> list[str]:
    """The names of the cases of SAMPLE."""
    return [case.name for case in cases("wmma") if any(part in case.name for part in SAMPLE)]


def test_the_sample_is_of_cases_that_are_there() -> None:
    assert all(any(part in name for name in sampled()) for part in SAMPLE)


@pytest.mark.skipif(not EMULATOR, reason="GGUF_SD_EMULATOR names no checkout of tinygrad, whose emulator is needed")
def test_kernels_as_machine_code(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(str(ROOT / folder) for folder in ("", "kernels", "convert"))
    command = [sys.executable, "-m", "gguf_sd_kernels.tools.emulate", "--emulator", str(EMULATOR)]
    command += ["--json", str(tmp_path / "emulated.json"), *(f"--only={part}" for part in SAMPLE)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "emulated.json").read_text())
    assert report["target"] == "gfx1100"
    assert len(report["results"]) == len(sampled())
    assert all(result["launches"] and result["error"] <= result["limit"] for result in report["results"])


@pytest.fixture
def stand_in() -> Iterator[Gpu]:
    """A CPU that counts as another GPU."""
    gpu = Gpu("emulated gfx1100", "wmma", 4)
    devices.stands_in = gpu
    yield gpu
    devices.stands_in = INTERPRETER


def test_a_cpu_stands_in_for_another_gpu(stand_in: Gpu) -> None:
    """Launches are that GPU's, kernels are compiled as for it, and the engine lets its kernels run."""
    cpu = torch.device("cpu")
    assert gpu_of(cpu) is stand_in
    assert not Launch(32, 64, 64, 4, 2).decoding(cpu, torch.bfloat16)["WIDEN"]
    assert choose_kernels("fused", "auto", cpu) == ("fused", "quantized")


def test_a_cpu_is_the_interpreter_otherwise() -> None:
    cpu = torch.device("cpu")
    assert gpu_of(cpu) is INTERPRETER
    assert Launch(32, 64, 64, 4, 2).decoding(cpu, torch.bfloat16)["WIDEN"]
    with pytest.raises(GgufSdError, match="run on a GPU"):
        choose_kernels("fused", "auto", cpu)


def test_cases_are_every_launch_of_the_tables() -> None:
    names = [case.name for case in cases("wmma")]
    assert len(names) == len(set(names))
    for _, launch in UNTUNED["wmma"]:
        tile = f"{launch.block_m}x{launch.block_n}x{launch.block_k} {launch.warps}w {launch.stages}s"
        for op in ("linear", "geglu", "conv 1x1", "conv 3x3"):
            assert sum(name.startswith(f"{op} ") and tile in name for name in names) >= 12  # types, dtypes, splits


def test_an_error_is_measured() -> None:
    def run() -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    want = torch.tensor([3.0, 4.0], dtype=torch.float64)
    case = Case("kernel", "launch", "shape", 1e-3, run)
    assert case.error(torch.tensor([3.0, 4.5]), want) == pytest.approx(0.1)
    assert Case("kernel", "launch", "shape", 1e-3, run, is_picture=True).error(want + 0.2, want) == pytest.approx(0.2)
    with pytest.raises(ValueError, match="result is"):
        case.error(want[:1], want)


@pytest.mark.parametrize("qtype", ["Q4_0", "Q4_1", "Q8_0"])
def test_random_weights_are_of_a_size_that_products_keep(qtype: str) -> None:
    from gguf_sd_kernels.reference.products import dequantize

    torch.manual_seed(0)
    values = dequantize(random_blocks(qtype, 64, 128), qtype)
    assert 0.05 < values.std() < 1
    assert abs(values.mean()) < 0.2


def test_a_run_goes_on_where_it_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what was right, of the same kernels alone."""
    path = tmp_path / "emulated.json"
    assert earlier(path, "gfx1100") == {}
    right = Executed("linear", "Q4_0", "5x32x32", 1e-4, 2e-3, 1.0, 1.0, 1)
    wrong = replace(right, kernel="geglu", error=1.0)
    path.write_text(json.dumps(versions("gfx1100") | {"date": "another", "results": [asdict(right), asdict(wrong)]}))
    assert earlier(path, "gfx1100") == {"linear Q4_0 5x32x32": right}
    monkeypatch.setattr("gguf_sd_kernels.tools.emulate.kernels_version", lambda: "another")
    assert earlier(path, "gfx1100") == {}


def test_what_is_no_checkout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no checkout of tinygrad"):
        Emulator(tmp_path)
