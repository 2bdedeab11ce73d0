"""Commands in processes that are killed at any moment: forked from one that has imported everything already."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from multiprocessing.process import BaseProcess


def start(arguments: list[str], folder: str, environment: dict[str, str] | None = None) -> BaseProcess:
    """A process that runs a command of gguf-sd's in a folder; silent. ``environment`` is added to that of the process
    that all are forked from."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.killed_imports"])
    process = context.Process(target=_command, args=(arguments, folder, environment or {}), daemon=True)
    process.start()
    return process


def _command(arguments: list[str], folder: str, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    import threading

    from tqdm import tqdm

    from gguf_sd.cli.main import main

    tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system's, which a kill would leave behind
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    os.chdir(folder)
    os._exit(main(arguments))


def kill(process: BaseProcess, seconds: float) -> bool:
    """Kills it after so long, without a chance to clean up; False where it had ended by then."""
    time.sleep(seconds)
    running = process.is_alive()
    if process.pid is not None and running:
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    return running
