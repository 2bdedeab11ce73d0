"""Time, by stage, and peak memory of one calibrated conversion.

    python -m benchmarks.cpu.bench_calibrate /tmp/sd15.safetensors --tokenizer vocab.gz --output results.json

The conversion runs in this process, as `gguf-sd convert --calibrate` runs it; peak memory is the process's maximum
resident set, mapped pages of its files included.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks.cpu.bench_step import cpu_name
from gguf_sd_convert.calibrate.options import Calibration
from gguf_sd_convert.convert import ConvertOptions, convert

TOLD = 30.0  # seconds between lines on stderr


class Stages:
    """Seconds since the start and of each stage, from the converter's progress."""

    def __init__(self) -> None:
        self.started = self.told = time.perf_counter()
        self.doing, self.entered = "preparing", self.started
        self.seconds: dict[str, float] = {}

    def __call__(self, done: int, total: int, doing: str) -> None:
        now = time.perf_counter()
        if doing != self.doing:
            self.leave(now)
            self.doing, self.entered = doing, now
        if now - self.told > TOLD:
            self.told = now
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
            print(f"{now - self.started:6.0f} s  {doing} {done} of {total}, peak {peak:.2f} GB", file=sys.stderr)

    def leave(self, now: float) -> None:
        self.seconds[self.doing] = round(self.seconds.get(self.doing, 0.0) + now - self.entered, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--type", default="q4_0")
    parser.add_argument("--samples", type=int, default=0)
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    args = parser.parse_args()
    stages = Stages()
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        options = ConvertOptions(
            type=args.type, tokenizer=args.tokenizer, calibration=Calibration(samples=args.samples)
        )
        report = convert(args.source, Path(folder) / "calibrated.gguf", options, stages)
    stages.leave(now := time.perf_counter())
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "benchmarks.cpu.bench_calibrate", *(_plain(a) for a in sys.argv[1:])]),
        "source": args.source.name,
        "type": report.type,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg(),
        "torch": torch.__version__,
        "seconds": round(now - stages.started, 1),
        "stage_seconds": stages.seconds,
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6),
        "bytes": report.nbytes,
        "notes": report.notes,
    }
    print(json.dumps(result, indent=1))
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


def _plain(argument: str) -> str:
    """Without the machine's folders."""
    return Path(argument).name if os.sep in argument else argument


if __name__ == "__main__":
    main()
