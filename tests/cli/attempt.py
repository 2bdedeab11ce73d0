"""Commands as a user gives them, each in a process forked from one that has imported everything: what it costs, and how
it ends."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Ended:
    """``code``: of the exit, negative for a signal. ``seconds``: of the processor; ``megabytes``: of memory added."""

    code: int
    out: str
    err: str
    seconds: float
    megabytes: int


def attempt(arguments: list[str], folder: Path, limit: float = 60) -> Ended:
    """Runs a command in ``folder``; after ``limit`` seconds it is killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.killed_imports"])
    names = [folder / f".{name}" for name in ("out", "err", "cost")]
    process = context.Process(target=_run, args=(arguments, str(folder), *map(str, names)), daemon=True)
    process.start()
    process.join(limit)
    if process.is_alive():
        process.kill()
        process.join()
    out, err, cost = (name.read_text(errors="replace") if name.exists() else "" for name in names)
    for name in names:
        name.unlink(missing_ok=True)
    seconds, kilobytes = json.loads(cost or f"[{limit}, 0]")
    return Ended(process.exitcode or 0, out, err, seconds, kilobytes >> 10)


def _run(arguments: list[str], folder: str, out: str, err: str, cost: str) -> None:
    for descriptor, name in ((1, out), (2, err)):
        os.dup2(os.open(name, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), descriptor)
    os.environ["GGUF_SD_CACHE"] = os.path.join(folder, "cache")
    os.environ["GGUF_SD_NATIVE"] = "0"  # each attempt would build the kernels in C++ anew
    os.chdir(folder)
    from gguf_sd.cli.main import main

    peak, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    code = main(arguments)
    used = time.process_time() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    Path(cost).write_text(json.dumps(used))
    os._exit(code)
