"""One contestant's turn, in a process of its own: pictures, times and memory.

    python -m gguf_sd.bench.contestant TASK.json

The task says what to paint and where to put it (:class:`Task`); the result is written beside the pictures as
``result.json``, whole or not at all.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

from gguf_sd.atomic_write import put_in_place, temporary_beside
from gguf_sd.bench.peers import PEERS
from gguf_sd.errors import GgufSdError

RESULT = "result.json"


@dataclass(frozen=True)
class Task:
    """Pictures to paint, each a number, prompt, seed and settings; ``calls``: a file of UNet calls to predict, which
    the first contestant writes first (``record``)."""

    model: str
    program: str
    pictures: list[tuple[int, str, int, dict[str, Any]]]
    folder: str
    device: str = "auto"
    dtype: str = "auto"
    weights: str = "auto"
    calls: str | None = None
    record: bool = False
    sdcpp: str = ""  # stable-diffusion.cpp's program, for that peer


@dataclass
class Result:
    """Seconds and bytes. ``first_step_s`` counts from before the model was opened."""

    load_s: float = 0.0
    first_step_s: float = 0.0
    step_s: list[float] = field(default_factory=list)  # the median step of each picture
    vae_s: list[float] = field(default_factory=list)
    picture_s: list[float] = field(default_factory=list)
    peak_rss: int = 0
    peak_vram: int = 0
    joules: float | None = None  # of the GPU, for the pictures
    device: str = ""
    dtype: str = ""
    weights: str = ""


def main(path: str) -> None:
    task = Task(**json.loads(Path(path).read_text()))
    folder = Path(task.folder)
    folder.mkdir(parents=True, exist_ok=True)
    peer = PEERS.get(task.program)
    try:
        result: Result = (import_module(peer.module).paint if peer else _paint)(task, folder)
    except GgufSdError as error:
        sys.exit(str(error))
    result.peak_rss = result.peak_rss or peak_rss()
    with temporary_beside(folder / RESULT) as temporary:
        temporary.write_text(json.dumps(asdict(result), indent=1))
        put_in_place(temporary, folder / RESULT)


def peak_rss() -> int:
    """Of this process, bytes."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Clock:
    """Times of one picture: of its steps, and of what comes after the last."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.ticks: list[float] = []

    def tick(self, *_: object) -> None:
        self.ticks.append(time.perf_counter())

    def put_into(self, result: Result) -> None:
        """The first step is left out, where there are more: it waits for what is loaded late."""
        ends = [self.started, *self.ticks]
        steps = [b - a for a, b in pairwise(ends)]
        now = time.perf_counter()
        result.step_s.append(statistics.median(steps[1:] or steps))
        result.vae_s.append(now - ends[-1])
        result.picture_s.append(now - self.started)


def _paint(task: Task, folder: Path) -> Result:
    started = time.perf_counter()
    import torch

    from gguf_sd.pipeline import Pipeline

    result = Result()
    pipeline = Pipeline.load(task.model, task.device, task.dtype, task.weights)
    result.load_s = time.perf_counter() - started
    result.device, result.dtype = str(pipeline.device), str(pipeline.dtype).removeprefix("torch.")
    if not task.pictures:
        return result
    _, prompt, seed, settings = task.pictures[0]
    clock = Clock()
    for picture in pipeline.paint(pipeline.prepare(_request(prompt, seed, settings)), clock.tick):  # to warm up
        result.weights = picture.weights
    result.first_step_s = clock.ticks[0] - started
    cuda = pipeline.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(pipeline.device)
    meter = EnergyMeter(pipeline.device.index or 0) if cuda else None
    for number, prompt, seed, settings in task.pictures:
        job = pipeline.prepare(_request(prompt, seed, settings))
        clock = Clock()
        (picture,) = pipeline.paint(job, clock.tick)
        clock.put_into(result)
        picture.image.save(folder / f"{number:05}.png")
    result.joules = meter.joules() if meter else None
    result.peak_rss, result.peak_vram = peak_rss(), torch.cuda.max_memory_allocated(pipeline.device) if cuda else 0
    if task.calls is not None:
        from gguf_sd.bench.calls_file import predict

        predict(pipeline, Path(task.calls), folder, [p[1] for p in task.pictures] if task.record else None)
    return result


def _request(prompt: str, seed: int, settings: dict[str, Any]) -> Any:
    from gguf_sd.request import Request

    return Request(prompt=prompt, seed=seed, safety="off", **settings)


class EnergyMeter:
    """What a GPU has taken since, by NVML; nothing where that does not tell."""

    def __init__(self, index: int):
        self.read: Callable[[], float] | None = None
        try:
            import pynvml

            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            self.read = lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
            self.start = self.read()
        except Exception:  # no such package, driver or counter: there is nothing to tell
            self.read = None

    def joules(self) -> float | None:
        return None if self.read is None else self.read() - self.start


if __name__ == "__main__":
    main(sys.argv[1])
