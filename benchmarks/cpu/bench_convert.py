"""Times, peak memory and file sizes of conversions, next to stable-diffusion.cpp's on the same checkpoint.

    python -m benchmarks.cpu.bench_convert /tmp/sd15.safetensors --tokenizer vocab.gz --output results.json

Every conversion is a process of its own, start and imports included; peak memory is the process's maximum resident
set. stable-diffusion.cpp takes part where ``stable_diffusion_cpp`` can be imported, by this Python or by the one that
--sdcpp-python names. Rounds alternate between the programs; the table shows medians.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

OURS = """
import resource, sys
from gguf_sd.cli.main import main
code = main(["convert", *sys.argv[1:], "--quiet", "--force"])
print("PEAK", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
sys.exit(code)
"""
SDCPP = """
import resource, sys
import stable_diffusion_cpp.stable_diffusion_cpp as sd
kinds = {"f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 8}
done = sd.convert(sys.argv[1].encode(), b"", sys.argv[2].encode(), kinds[sys.argv[3]], b"", False)
print("PEAK", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
sys.exit(not done)
"""


def measure(command: list[str], target: Path) -> dict[str, float]:
    """Seconds, processor seconds, peak resident MB and bytes of one conversion."""
    target.unlink(missing_ok=True)
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    if done.returncode:
        raise SystemExit(f"{' '.join(command[3:])} failed:\n{done.stderr[-2000:]}")
    peak = next(int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("PEAK"))
    return {"seconds": seconds, "cpu_seconds": cpu, "peak_mb": peak / 1024, "bytes": target.stat().st_size}


def commands(args: argparse.Namespace, kind: str, target: Path) -> dict[str, list[str]]:
    extra = ["--tokenizer", str(args.tokenizer)] if args.tokenizer else []
    ours = [sys.executable, "-c", OURS, str(args.source), "-o", str(target), "--type", kind, *extra]
    found = {"gguf-sd": ours}
    python = args.sdcpp_python or (sys.executable if importlib.util.find_spec("stable_diffusion_cpp") else None)
    if python:
        found["sd.cpp"] = [str(python), "-c", SDCPP, str(args.source), str(target), kind]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--types", nargs="+", default=["q4_0", "q4_1", "q8_0", "f16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sdcpp-python", type=Path, help="Python that can import stable_diffusion_cpp")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        for kind in args.types:
            target = Path(folder) / f"{kind}.gguf"
            programs = commands(args, kind, target)
            runs: dict[str, list[dict[str, float]]] = {name: [] for name in programs}
            for _ in range(args.rounds):
                for name, command in programs.items():
                    runs[name].append(measure(command, target))
            for name, measured in runs.items():
                row = {key: statistics.median(run[key] for run in measured) for key in measured[0]}
                rows.append({"type": kind, "program": name, **row, "all_seconds": [r["seconds"] for r in measured]})
                times = f"{row['seconds']:6.1f} s {row['cpu_seconds']:6.1f} s cpu"
                print(f"{kind:5} {name:8} {times} {row['peak_mb']:6.0f} MB {row['bytes']:>13,.0f} B")
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "source": args.source.name,
        "source_bytes": args.source.stat().st_size,
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
        "torch": torch.__version__,
        "rows": rows,
    }
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
