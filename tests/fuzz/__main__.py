"""A long run by hand: `python -m tests.fuzz --json benchmarks/results/fuzz.json`, from the repository's root.

Cases go by their number, kind after kind; `--first` begins elsewhere, `--kind KIND --first N --cases 1` repeats one.
Cases that end in anything but success or one sentence, take longer than a second of the processor's or add more than
300 MB are told, and the run goes on; the figures are written every thousand cases. With `--resume` a run goes on where
the figures in the file end, in a process of its own: `--seconds 600 --resume`, as often as it takes. Files go to
TMPDIR; a folder in memory (`TMPDIR=/dev/shm`) is the fastest.
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after which no further case begins")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--kind", action="append", help="may be given several times; default: all")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--resume", action="store_true", help="go on where the run in --json ended, up to --cases")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        save_pipeline(Tiny(safety=True, **SMALL), source)
        run = Run(Cases(source, Path(folder)), args)
        if args.resume and args.json and args.json.exists():
            run.go_on(json.loads(args.json.read_text()))
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
        self.number = args.first
        self.earlier: dict[str, Any] = {}

    def go_on(self, earlier: dict[str, Any]) -> None:
        """Adds what follows to the report of a run that ended early."""
        self.earlier, self.args.first = earlier, earlier["first"]
        self.number, self.findings = earlier["first"] + earlier["cases"], earlier["findings"]
        for kind, figures in earlier["kinds"].items():
            self.slowest[kind] = figures.pop("slowest_s"), figures.pop("its_number")
            self.counts[kind] = Counter(figures)

    def all(self) -> None:
        end = self.args.first + self.args.cases
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
        return {
            "cases": self.number - self.args.first,
            "first": self.args.first,
            "findings": self.findings[:100],
            "kinds": {
                kind: {**self.counts[kind], "slowest_s": self.slowest[kind][0], "its_number": self.slowest[kind][1]}
                for kind in self.kinds
            },
            "seconds": round(time.monotonic() - self.began) + self.earlier.get("seconds", 0),
            "seconds_of_the_processor": round(time.process_time() - self.used)
            + self.earlier.get("seconds_of_the_processor", 0),
            "memory_growth_mb": max((peak() - self.memory) >> 10, self.earlier.get("memory_growth_mb", 0)),
            "processes": self.earlier.get("processes", 0) + 1,
            "python": platform.python_version(),
            "date": time.strftime("%Y-%m-%d"),
        }


def peak() -> int:
    """The most memory that this process has had, in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    sys.exit(main())
