"""Several ways to make the same UNet step, timed in turns; with the memory that each takes, and what it computed."""

from __future__ import annotations

import gc
import statistics
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.lib.deadline import Deadline
from benchmarks.lib.device import call_seconds, settled_memory, synchronize, used_memory

MIN_ROUNDS, MAX_ROUNDS, SECONDS = 5, 30, 2.5


@dataclass
class Contender:
    """``run`` makes a step, ``before`` runs ahead of each, untimed. Bytes: ``weights``, the same by the driver's count,
    and what a graph holds: by its own count and by the driver's."""

    run: Callable[[], Tensor]
    weights: int
    weights_driver: int = 0
    graph: int = 0
    graph_driver: int = 0
    before: Callable[[], object] = lambda: None


@dataclass
class Interleaved:
    """What came of it: milliseconds, bytes and results by the contenders' names, reasons where one failed."""

    ms: dict[str, float] = field(default_factory=dict)
    memory: dict[str, dict[str, int]] = field(default_factory=dict)
    results: dict[str, Tensor] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


def run_interleaved(
    makers: Mapping[str, Callable[[], Contender]], device: torch.device, deadline: Deadline
) -> Interleaved:
    """Makes the contenders one after another, then times all of them in turns. One that fails leaves the others be.

    Raises RuntimeError where the GPU takes no more work.
    """
    interleaved = Interleaved()
    ready: dict[str, Contender] = {}
    estimate = 0.0
    for name, make in makers.items():
        if deadline.passed:
            interleaved.left_out.append(name)
            continue
        try:
            contender = make()
            contender.before()
            interleaved.results[name] = contender.run().float()
            estimate += _seconds(contender, device)
            interleaved.memory[name] = _memory(contender, device)
            ready[name] = contender
        except Exception as problem:
            print(f"FAILED {name}\n{traceback.format_exc(limit=-6)}", flush=True)
            interleaved.failures[name] = f"{type(problem).__name__}: {problem}".splitlines()[0]
            synchronize(device)
    rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, int(SECONDS / max(estimate, 1e-6)))) if device.type == "cuda" else 1
    times: dict[str, list[float]] = {name: [] for name in ready}
    for turn in range(-1 if device.type == "cuda" else 0, rounds):
        for name, contender in ready.items():
            seconds = _seconds(contender, device)
            if turn >= 0:  # the one before settles torch's memory
                times[name].append(seconds)
    interleaved.ms = {name: round(statistics.median(values) * 1e3, 4) for name, values in times.items()}
    del ready
    gc.collect()
    return interleaved


def _seconds(contender: Contender, device: torch.device) -> float:
    contender.before()
    return call_seconds(contender.run, device)


def _memory(contender: Contender, device: torch.device) -> dict[str, int]:
    """Bytes on the device: weights, what a step takes beside them, and what a graph holds; "driver" is what the driver
    gave out for it, "peak" their sum."""
    found = {"weights": contender.weights}
    if device.type == "cpu":
        return found
    before = settled_memory(device)
    torch.cuda.reset_peak_memory_stats(device)
    allocated = torch.cuda.memory_allocated(device)
    contender.before()
    contender.run()
    synchronize(device)
    step, step_driver = torch.cuda.max_memory_allocated(device) - allocated, used_memory(device) - before
    return found | {
        "weights_driver": contender.weights_driver,
        "step": step,
        "step_driver": step_driver,
        "graph": contender.graph,
        "graph_driver": contender.graph_driver,
        "peak": contender.weights + step + contender.graph_driver,
        "peak_driver": contender.weights_driver + step_driver + contender.graph_driver,
    }
