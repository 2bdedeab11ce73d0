"""Commands in processes that are killed at any moment: forked from one that has imported everything already."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from multiprocessing.process import BaseProcess
from typing import Any

CHANGES = {"open", "os.rename", "os.remove", "os.link", "os.mkdir", "os.rmdir", "os.truncate", "os.utime"}


def start(
    arguments: list[str], folder: str, environment: dict[str, str] | None = None, killed_at: int = 0
) -> BaseProcess:
    """A process that runs a command of gguf-sd's in a folder; silent. ``environment`` is added to that of the process
    that all are forked from. With ``killed_at`` it kills itself before it changes anything in the folder for the so
    many-th time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.killed_imports"])
    process = context.Process(target=_command, args=(arguments, folder, environment or {}, killed_at), daemon=True)
    process.start()
    return process


def _command(arguments: list[str], folder: str, environment: dict[str, str], killed_at: int) -> None:
    os.environ.update(environment)
    import threading

    from tqdm import tqdm

    from gguf_sd.cli.main import main

    tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system's, which a kill would leave behind
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    os.chdir(folder)
    if killed_at:
        _kill_at(killed_at, os.path.realpath(folder))
    os._exit(main(arguments))


def _kill_at(number: int, folder: str) -> None:
    """Watches what Python is about to do to files."""
    changes = 0

    def watch(event: str, args: tuple[Any, ...]) -> None:
        nonlocal changes
        if event not in CHANGES or not isinstance(args[0], str | os.PathLike):
            return
        if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        if os.path.abspath(args[0]).startswith(folder):
            changes += 1
            if changes == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def kill(process: BaseProcess, seconds: float) -> bool:
    """Kills it after so long, without a chance to clean up; False where it had ended by then."""
    time.sleep(seconds)
    running = process.is_alive()
    if process.pid is not None and running:
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    return running
