"""Executes the kernels' machine code for gfx1100 (AMD RDNA 3) without a GPU, and holds results against float64.

    python -m gguf_sd_kernels.tools.emulate --emulator PATH             # every kernel and launch; the demo model's UNet
    python -m gguf_sd_kernels.tools.emulate --emulator PATH --picture   # a whole picture of the demo model besides
    python -m gguf_sd_kernels.tools.emulate --emulator PATH --only "conv 3x3 Q8_0"

PATH is a checkout of https://github.com/tinygrad/tinygrad, whose emulator executes the instructions; it needs clang.
Our own launching functions run unchanged, on CPU tensors. The UNet and the picture need this project's repository as
the current folder. The exit code is 1 where something does not agree.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from gguf_sd_kernels import devices
from gguf_sd_kernels.tools.emulate_cases import Case, cases
from gguf_sd_kernels.tools.emulated_gpu import EmulatedGpu, emulated_gpu
from gguf_sd_kernels.tools.emulator import TARGETS, Emulator
from gguf_sd_kernels.tuning.fingerprint import kernels_version

# Whole steps and pictures: above this package, so found by name where they are.
MODEL_CASES = "benchmarks.lib.emulated_model"


@dataclass(frozen=True)
class Executed:
    """What came of a case, its ``error`` as in :meth:`Case.error`, and ``psnr`` in dB for a picture."""

    kernel: str
    launch: str
    shape: str
    error: float
    limit: float
    seconds: float  # in all, compilation included
    emulated: float  # seconds in the emulator
    launches: int
    psnr: float | None = None
    fault: str = ""

    @property
    def name(self) -> str:
        """As :attr:`Case.name`."""
        return f"{self.kernel} {self.launch} {self.shape}"

    @property
    def ok(self) -> bool:
        return not self.fault and self.error <= self.limit  # False for NaN


def execute(case: Case, gpu: EmulatedGpu) -> Executed:
    """Runs a case; what it raises is its fault."""
    before, emulated, start = gpu.launches.total(), gpu.seconds, time.perf_counter()
    torch.manual_seed(case.seed())
    error, fault = float("nan"), ""
    try:
        with torch.inference_mode():
            got, want = case.run()
        error = case.error(got, want)
    except Exception as exception:  # of the compiler, the emulator or our launch: a line of the table
        fault = f"{type(exception).__name__}: {exception}"
    launches = gpu.launches.total() - before
    return Executed(
        case.kernel,
        case.launch,
        case.shape,
        error,
        case.limit,
        round(time.perf_counter() - start, 3),
        round(gpu.seconds - emulated, 3),
        launches,
        psnr=-20 * math.log10(error) if case.is_picture and error > 0 else None,
        fault=fault or ("" if launches else "nothing was launched"),
    )


def chosen_cases(target: str, only: Sequence[str], every: int, picture: bool) -> Iterator[Case]:
    """Each ``every``-th of the kernels' cases with one of ``only`` in its name, then whole steps and a picture so
    named."""
    family = devices.architecture_family(target)
    assert family is not None
    yield from [case for case in cases(family) if _named(case, only)][::every]
    if find_spec(MODEL_CASES.partition(".")[0]) is None:
        print(f"no {MODEL_CASES} here: the UNet and the picture need the repository as the current folder")
        return
    yield from (case for case in _model_cases(picture) if _named(case, only))


def _named(case: Case, only: Sequence[str]) -> bool:
    return any(part in case.name for part in only)


def _model_cases(picture: bool) -> Iterator[Case]:
    model: Any = importlib.import_module(MODEL_CASES)
    yield from model.unet_cases()
    if picture:
        yield from model.picture_cases()


def line(done: Executed) -> str:
    """A row of the table."""
    error = f"{done.error:9.1e}" if done.psnr is None else f"{done.psnr:6.1f} dB"
    return (
        f"{done.kernel:16} {done.launch:36} {done.shape:18} {error} {done.seconds:8.2f} {done.emulated:8.2f} "
        f"{done.launches:5}{'' if done.ok else '  FAULT: ' + (done.fault or f'above {done.limit:g}')}"
    )


def versions(target: str) -> dict[str, str]:
    import triton

    return {
        "date": datetime.now(UTC).date().isoformat(),
        "target": target,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "kernels": kernels_version(),
        "llvm": _llvm_version(Path(triton.__file__).parent / "_C/libtriton.so"),
        "emulator": "tinygrad, test/mockgpu/amd/emu.py",
    }


def earlier(path: Path, target: str) -> dict[str, Executed]:
    """What an earlier run left in the file and was right, by the case's name; nothing of other kernels or versions."""
    if not path.is_file():
        return {}
    report = json.loads(path.read_text())
    if any(report.get(name) != value for name, value in versions(target).items() if name != "date"):
        return {}
    results = [Executed(**entry) for entry in report["results"]]
    return {done.name: done for done in results if done.ok}


@cache
def _llvm_version(library: Path) -> str:
    """The version of LLVM that Triton's library was built with, as it stands in it."""
    found = re.search(rb"LLVM version ([\w.]+)", library.read_bytes()) if library.is_file() else None
    return found[1].decode() if found else "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--emulator", type=Path, required=True, help="folder of a checkout of tinygrad")
    parser.add_argument("--target", choices=list(TARGETS), default="gfx1100", help="gfx942: but for products")
    parser.add_argument(
        "--only", action="append", help="a part of the names of what is run: kernel, launch and shape; may be repeated"
    )
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only each N-th of the kernels' cases")
    parser.add_argument("--picture", action="store_true", help="a picture of the demo model too, in minutes")
    parser.add_argument("--json", type=Path, help="file to write results to")
    parser.add_argument("--resume", action="store_true", help="do not run again what --json has of the same kernels")
    args = parser.parse_args()
    try:
        emulator = Emulator(args.emulator, TARGETS[args.target])
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    if args.resume and not args.json:
        parser.error("--resume goes on with the results in --json: name that file")
    known = earlier(args.json, args.target) if args.resume else {}
    results: list[Executed] = []
    titles = "error", "seconds", "emulated"
    print(f"{'kernel':16} {'launch':36} {'shape':18} {titles[0]:>9} {titles[1]:>8} {titles[2]:>8}   launches")
    with emulated_gpu(emulator) as gpu:
        for case in chosen_cases(args.target, args.only or [""], max(1, args.every), args.picture):
            results.append(known.get(case.name) or execute(case, gpu))
            print(line(results[-1]), flush=True)
            if args.json:  # after each, so that an interrupted run leaves what it has
                report = versions(args.target) | {"results": [asdict(done) for done in results]}
                args.json.write_text(json.dumps(report, indent=1) + "\n")
    faults = sum(not done.ok for done in results)
    print(f"{len(results)} executed, {faults} with faults, {sum(done.launches for done in results)} launches")
    sys.exit(bool(faults) or not results)


if __name__ == "__main__":
    main()
