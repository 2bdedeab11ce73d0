"""A long run by hand: `python -m tests.fuzz --seconds 3600 --json benchmarks/results/fuzz.json`, from the repository's
root. Cases go by their number, kind after kind; `--first` begins elsewhere, `--kind KIND --first N --cases 1` repeats
one. Ends at the first case that ends in anything but success or one sentence."""

from __future__ import annotations

import argparse
import json
import platform
import resource
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from tests.conftest import Tiny, save_pipeline
from tests.fuzz.cases import Cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--kind")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        save_pipeline(Tiny(safety=True), source)
        report = run(Cases(source, Path(folder)), args)
    print(json.dumps(report, indent=1))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


def run(cases: Cases, args: argparse.Namespace) -> dict[str, Any]:
    kinds = [args.kind] if args.kind else list(cases.kinds)
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in kinds}
    slowest = dict.fromkeys(kinds, (0.0, 0))
    began, memory = time.monotonic(), peak()
    number = args.first
    while number < args.first + args.cases and time.monotonic() - began < args.seconds:
        kind = kinds[number % len(kinds)]
        try:
            outcome = cases.run(kind, number)
        except BaseException:
            print(f"case {number} of kind {kind}")
            raise
        counts[kind]["refused" if outcome.refused else "fine"] += 1
        slowest[kind] = max(slowest[kind], (round(outcome.seconds, 3), number))
        number += 1
    return {
        "cases": number - args.first,
        "first": args.first,
        "kinds": {
            kind: {**counts[kind], "slowest_s": slowest[kind][0], "its_number": slowest[kind][1]} for kind in kinds
        },
        "seconds": round(time.monotonic() - began),
        "memory_growth_mb": round((peak() - memory) / 1024),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def peak() -> int:
    """The most memory that this process has had, in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()
