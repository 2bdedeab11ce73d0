"""How long `gguf-sd` takes from the shell to an answer: help, refusals, inspect, and the demo model's first step.

    python -m benchmarks.cpu.bench_startup --json benchmarks/results/startup.json

Every run is a process of its own, from its start to its end; the first step is when its preview (--preview 1) lies on
the disk, some ten milliseconds after the step itself. Runs alternate between the commands; medians are shown, with the
processor seconds (user and system), which a busy machine lengthens less, and the peak resident set.
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


def measure(arguments: list[str], code: int, preview: Path | None = None) -> Run:
    """Runs one command; its seconds end with it, or when ``preview`` was written."""
    if preview:
        preview.unlink(missing_ok=True)
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


def commands(folder: Path) -> dict[str, tuple[list[str], int, Path | None]]:
    """Arguments, exit code, and the preview to wait for, of each command; the demo model is converted here."""
    from gguf_sd.demo import model_folder

    model, picture, lora = folder / "demo.gguf", folder / "out.png", folder / "lora.safetensors"
    # In a process of its own: what this one holds would count as its children's peak.
    measure(["convert", str(model_folder()), "-o", str(model), "--quiet"], 0)
    header = b'{"lora_unet_mid.lora_up.weight": {"dtype": "F16", "shape": [1], "data_offsets": [0, 2]}}'
    lora.write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    paint = ["generate", str(model), "-p", "a red circle", "--seed", "1", "-o", str(picture), "--preview", "1"]
    return {
        "help": (["--help"], 0, None),
        "version": (["--version"], 0, None),
        "inspect": (["inspect", str(model)], 0, None),
        "missing file": (["generate", str(folder / "missing.gguf"), "-p", "a"], 2, None),
        "bad argument": (["generate", "--steps", "x"], 2, None),
        "no model": (["generate", str(lora), "-p", "a"], 2, None),
        "first step": ([*paint, "--steps", "1", "--quiet"], 0, picture.with_suffix(".preview.png")),
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
    parser.add_argument("--json", type=Path, help="write the results there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        todo = commands(Path(name))
        runs: dict[str, list[Run]] = {name: [] for name in todo}
        for index in range(args.runs + 1):
            for name, (arguments, code, preview) in todo.items():
                run = measure(arguments, code, preview)
                if index:  # the first one fills caches
                    runs[name].append(run)
    results = report(runs)
    print(f"{'':14} {'seconds':>8} {'fastest':>8} {'target':>7} {'cpu s':>7} {'peak MB':>8}")
    for name, row in results.items():
        target = row["target"] or ""
        print(f"{name:14} {row['seconds']:>8.2f} {row['fastest']:>8.2f} {target:>7} {row['cpu_seconds']:>7.2f} "
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
