"""The tuner in a process of its own: a kernel that hangs, or takes the GPU's context down, ends that process alone.

A kernel that runs cannot be ended from within its process, and after an illegal access no other kernel runs there. So
kernels run for the first time in a child, which is ended where it says nothing for ``QUIET_SECONDS``; what it was at is
set aside, and another child does the rest. A driver that does not let go of a hung kernel when its process ends is
beyond this: then the GPU hangs, as it would with any program.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import torch

from gguf_sd_kernels.tuning.launch import measured_entry
from gguf_sd_kernels.tuning.self_check import Subject
from gguf_sd_kernels.tuning.tuner import Event, Job, Tuner

COMMAND = (sys.executable, "-m", "gguf_sd_kernels.tuning.child")
QUIET_SECONDS = 60.0  # the longest compilation of one kernel, and more
BEGIN_SECONDS = 180.0  # for Python, torch and a context on the GPU
CHILDREN = 4  # processes for one job: each after the first because of a kernel that hung or crashed


class ChildError(Exception):
    """No child process could begin."""


def run_in_child(
    job: Job, device: torch.device, command: Sequence[str] = COMMAND, quiet_seconds: float = QUIET_SECONDS
) -> Iterator[Event]:
    """The events of :meth:`Tuner.run`; what hangs or crashes has such a verdict. Raises ChildError where the first
    child ends without a word."""
    known = dict(job.known)
    measured = set()
    for number in range(CHILDREN):
        child = _Child(job, device, command)
        try:
            for event in child.events(quiet_seconds):
                if "verdict" in event:
                    known[Subject.from_json(event["subject"])] = event["verdict"]
                if "measured" in event:
                    measured.add(measured_entry(event["measured"])[0])
                yield event
                if "done" in event:
                    return
        finally:
            child.end()
        if child.silent:
            if number:
                break
            raise ChildError(child.last_words())
        if child.begun is not None:
            known[Subject.from_json(child.begun)] = child.fate
            yield {"verdict": child.fate, "subject": child.begun}
        uses = tuple((use, count) for use, count in job.uses if use.product not in measured)
        job = replace(job, uses=uses, known=tuple(known.items()), seconds=child.left)
    yield {"done": True}


class _Child:
    """A process with the job; ``begun`` is the kernel it is at, ``fate`` how it ended there, ``silent`` until it tells
    of something."""

    def __init__(self, job: Job, device: torch.device, command: Sequence[str]):
        self.begun: dict[str, Any] | None = None
        self.fate, self.left, self.silent = "", job.seconds, True
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        try:
            self._process = subprocess.Popen(
                [*command, str(device)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            )
        except OSError as error:
            raise ChildError(f"no process can be started: {error.strerror}") from error
        self._lines: queue.Queue[bytes] = queue.Queue()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True).start()
        with contextlib.suppress(OSError), self._process.stdin as stdin:  # one that has ended is met later
            stdin.write(json.dumps(job.to_json()).encode())

    def _read(self, stdout: IO[bytes]) -> None:
        for line in stdout:
            self._lines.put(line)
        self._lines.put(b"")

    def events(self, quiet_seconds: float) -> Iterator[Event]:
        """Until the child ends, or says nothing for so long."""
        while True:
            try:
                line = self._lines.get(timeout=BEGIN_SECONDS if self.silent else quiet_seconds)
            except queue.Empty:
                self.fate = (
                    f"it hangs: nothing came of it in {quiet_seconds:g} s" if not self.silent else "it never began"
                )
                return
            if not line:
                self._process.wait()
                self.fate = f"it ended its process, exit status {self._process.returncode}"
                return
            event: Event = json.loads(line)
            self.left, self.silent = event.pop("left", self.left), False
            if "begin" in event or "end" in event:
                self.begun = event.get("begin")
            yield event

    def last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read()[-4096:].decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else self.fate

    def end(self) -> None:
        """Ends the process without waiting for a driver that does not let it go."""
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)


def main() -> None:
    """The child: a job on stdin, events on stdout, one a line; whatever else is printed goes to stderr."""
    device = torch.device(sys.argv[1])
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    if device.type != "cpu":
        torch.get_device_module(device).set_device(device)
    tuner = Tuner(Job.from_json(json.load(sys.stdin)), device)
    for event in tuner.run():
        print(json.dumps(event | {"left": max(0.0, tuner.left)}), file=events, flush=True)


if __name__ == "__main__":
    main()
