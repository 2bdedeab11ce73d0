"""How long `gguf-sd` takes from the shell to an answer: help, refusals, inspect, and the demo model's first step.

    python -m benchmarks.cpu.bench_startup --json benchmarks/results/startup.json
    python -m benchmarks.cpu.bench_startup --only "first step" --only "first step, cold" --model sd15-q4_0.gguf

Every run is a process of its own, from its start to its end; the first step is when its preview (--preview 1) lies on
the disk, some ten milliseconds after the step itself. Runs alternate between the commands; medians are shown, with the
processor seconds (user and system), which a busy machine lengthens less, and the peak resident set. "cold" is with
nothing of the model's file in the system's cache; Python, torch and our code stay there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

PROGRAM = [sys.executable, "-m", "gguf_sd"]
TARGETS = {"help": 0.2, "inspect": 0.6, "missing file": 0.6, "bad argument": 0.6, "no model": 0.6, "first step": 3.0}


@dataclass(frozen=True)
class Run:
    seconds: float
    cpu_seconds: float
    peak_mb: float


@dataclass(frozen=True)
class Command:
    """What is run: the program's arguments, the exit code to expect, the preview to wait for, and the file that is not
    to be in the system's cache."""

    arguments: list[str]
    code: int = 0
    preview: Path | None = None
    cold: Path | None = None


def make_cold(path: Path) -> None:
    """Has the system forget what it keeps of a file. Linux alone does so for the asking."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())  # what is not on the disk yet cannot be forgotten
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(command: Command) -> Run:
    """Runs one command; its seconds end with it, or when its preview was written."""
    arguments, code, preview = command.arguments, command.code, command.preview
    if preview:
        preview.unlink(missing_ok=True)
    if command.cold:
        make_cold(command.cold)
    started, clock = time.time(), time.perf_counter()
    process = subprocess.Popen(PROGRAM + arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    error = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - clock
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != code:
        raise SystemExit(
            f"{' '.join(arguments)} ended with {process.returncode}, not {code}:\n{error.decode()[-2000:]}"
        )
    if preview:
        seconds = preview.stat().st_mtime - started
    return Run(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def commands(folder: Path, given: Path | None) -> dict[str, Command]:
    """The commands by their titles; the first steps are of the model ``given``, or the demo's, converted here."""
    from gguf_sd.demo import model_folder

    model, picture, lora = folder / "demo.gguf", folder / "out.png", folder / "lora.safetensors"
    # In a process of its own: what this one holds would count as its children's peak.
    measure(Command(["convert", str(model_folder()), "-o", str(model), "--quiet"]))
    header = b'{"lora_unet_mid.lora_up.weight": {"dtype": "F16", "shape": [1], "data_offsets": [0, 2]}}'
    lora.write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    painted, preview = given or model, picture.with_suffix(".preview.png")
    paint = ["generate", str(painted), "-p", "a red circle", "--seed", "1", "-o", str(picture), "--preview", "1"]
    paint += ["--steps", "1", "--quiet", "--force"]
    return {
        "help": Command(["--help"]),
        "version": Command(["--version"]),
        "inspect": Command(["inspect", str(model)]),
        "missing file": Command(["generate", str(folder / "missing.gguf"), "-p", "a"], 2),
        "bad argument": Command(["generate", "--steps", "x"], 2),
        "no model": Command(["generate", str(lora), "-p", "a"], 2),
        "first step": Command(paint, preview=preview),
        "first step, cold": Command(paint, preview=preview, cold=painted),
    }


def report(runs: dict[str, list[Run]]) -> dict[str, Any]:
    def median(name: str, what: str) -> float:
        return round(statistics.median(getattr(run, what) for run in runs[name]), 3)

    return {
        name: {what: median(name, what) for what in ("seconds", "cpu_seconds", "peak_mb")}
        | {"fastest": round(min(run.seconds for run in runs[name]), 3), "target": TARGETS.get(name)}
        for name in runs
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="of each command, after one that is not counted (5)")
    parser.add_argument("--model", type=Path, help="a GGUF file for the first steps (the demo's)")
    parser.add_argument("--only", action="append", help="a command to run; all by default, several may be given")
    parser.add_argument("--json", type=Path, help="write the results there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        todo = {n: c for n, c in commands(Path(name), args.model).items() if not args.only or n in args.only}
        runs: dict[str, list[Run]] = {name: [] for name in todo}
        for index in range(args.runs + 1):
            for name, command in todo.items():
                run = measure(command)
                if index:  # the first one fills caches
                    runs[name].append(run)
    results = report(runs)
    print(f"{'':17} {'seconds':>8} {'fastest':>8} {'target':>7} {'cpu s':>7} {'peak MB':>8}")
    for name, row in results.items():
        target = row["target"] or ""
        print(f"{name:17} {row['seconds']:>8.2f} {row['fastest']:>8.2f} {target:>7} {row['cpu_seconds']:>7.2f} "
              f"{row['peak_mb']:>8.0f}")  # fmt: skip
    if args.json:
        facts = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": f"{platform.machine()}, {os.cpu_count()} processors",
            "load": round(os.getloadavg()[0], 2),
            "python": platform.python_version(),
            "torch": version("torch"),
            "runs": args.runs,
            "results": results,
        }
        args.json.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
