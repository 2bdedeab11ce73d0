"""A long run by hand: `python -m tests.fuzz --json benchmarks/results/fuzz.json`, from the repository's root.

Cases go by their number, kind after kind; `--first` begins elsewhere, `--kind KIND --first N --cases 1` repeats one.
Cases that end in anything but success or one sentence, take longer than a second of the processor's or add more than
300 MB are told, and the run goes on; the figures are written every thousand cases. With `--resume` a run goes on where
the figures in the file end, in a process of its own: `--seconds 600 --resume`, as often as it takes; `--merge A B` adds
up the figures of runs beside one another. Files go to TMPDIR; a folder in memory (`TMPDIR=/dev/shm`) is the fastest.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import platform
import resource
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from tests.conftest import Tiny, save_pipeline
from tests.fuzz.cases import Cases
from tests.fuzz.material import SMALL

SECONDS, MEGABYTES = 1.0, 300
EVERY = 1000
COUNTED = ("refused", "fine", "found")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after which no further case begins")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--kind", action="append", help="may be given several times; default: all")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--resume", action="store_true", help="go on where the run in --json ended, up to --cases")
    parser.add_argument("--merge", type=Path, nargs="+", metavar="JSON", help="run nothing, add up these figures")
    args = parser.parse_args()
    if args.merge:
        print(json.dumps(together([json.loads(path.read_text()) for path in args.merge]), indent=1))
        return 0
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        save_pipeline(Tiny(safety=True, **SMALL), source)
        run = Run(Cases(source, Path(folder)), args)
        if args.resume and args.json and args.json.exists():
            run.earlier = json.loads(args.json.read_text())
        gc.collect()
        gc.freeze()  # half a million objects that stay: looking through them again takes a quarter of a second
        try:
            run.all()
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
    print(json.dumps(run.report(), indent=1))
    return 1 if run.findings else 0


class Run:
    def __init__(self, cases: Cases, args: argparse.Namespace):
        self.cases, self.args = cases, args
        self.kinds = args.kind or list(cases.kinds)
        self.counts: dict[str, Counter[str]] = {kind: Counter() for kind in self.kinds}
        self.slowest = dict.fromkeys(self.kinds, (0.0, 0))
        self.findings: list[str] = []
        self.began, self.used, self.memory = time.monotonic(), time.process_time(), peak()
        self.earlier: dict[str, Any] | None = None  # the report of a run that ended early, to which this one adds

    def all(self) -> None:
        end = self.args.first + self.args.cases
        self.first = self.number = self.args.first + (self.earlier["cases"] if self.earlier else 0)
        while self.number < end and time.monotonic() - self.began < self.args.seconds:
            self._one(self.kinds[self.number % len(self.kinds)], self.number)
            self.number += 1
            if self.args.json and (self.number % EVERY == 0 or self.number == end):
                beside = self.args.json.with_suffix(".new")
                beside.write_text(json.dumps(self.report(), indent=1) + "\n")
                os.replace(beside, self.args.json)

    def _one(self, kind: str, number: int) -> None:
        before = peak()
        try:
            outcome = self.cases.run(kind, number)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            self._found(kind, number, f"{type(error).__name__}: {error}")
            return
        self.counts[kind]["refused" if outcome.refused else "fine"] += 1
        self.slowest[kind] = max(self.slowest[kind], (round(outcome.seconds, 3), number))
        if outcome.seconds > SECONDS or peak() - before > MEGABYTES << 10:
            self._found(kind, number, f"{outcome.seconds:.1f} s, {(peak() - before) >> 10} MB")

    def _found(self, kind: str, number: int, what: str) -> None:
        self.counts[kind]["found"] += 1
        self.findings.append(f"{kind} {number}: {what[:200]!r}")
        print(self.findings[-1], file=sys.stderr, flush=True)

    def report(self) -> dict[str, Any]:
        own = {
            "cases": self.number - self.first,
            "first": self.first,
            "findings": self.findings[:100],
            "kinds": {
                kind: {**self.counts[kind], "slowest_s": self.slowest[kind][0], "its_number": self.slowest[kind][1]}
                for kind in self.kinds
            },
            "seconds": round(time.monotonic() - self.began),
            "seconds_of_the_processor": round(time.process_time() - self.used),
            "memory_growth_mb": (peak() - self.memory) >> 10,
            "processes": 1,
            "python": platform.python_version(),
            "date": time.strftime("%Y-%m-%d"),
        }
        return together([self.earlier, own] if self.earlier else [own])


def together(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """One report of several: sums, but for the slowest cases and the growth of one process, which are the highest."""
    kinds: dict[str, dict[str, Any]] = {}
    for report in reports:
        for kind, figures in report["kinds"].items():
            known = kinds.get(kind, {"slowest_s": -1.0, "its_number": 0})
            slowest = max(known, figures, key=lambda of: of["slowest_s"])
            counts = Counter({k: v for k, v in known.items() if k in COUNTED})
            counts.update({k: v for k, v in figures.items() if k in COUNTED})
            kinds[kind] = {**counts, "slowest_s": slowest["slowest_s"], "its_number": slowest["its_number"]}
    added = ("cases", "seconds", "seconds_of_the_processor", "processes")
    return {
        **reports[-1],
        **{name: sum(report[name] for report in reports) for name in added},
        "first": min(report["first"] for report in reports),
        "findings": [line for report in reports for line in report["findings"]][:100],
        "kinds": kinds,
        "memory_growth_mb": max(report["memory_growth_mb"] for report in reports),
    }


def peak() -> int:
    """The most memory that this process has had, in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    sys.exit(main())
