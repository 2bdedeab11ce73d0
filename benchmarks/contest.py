"""Several ways to make the same UNet step, timed in turns; with the memory that each takes, and what it computed."""

from __future__ import annotations

import gc
import statistics
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from deadline import Deadline
from device import call_seconds, settled_memory, synchronize, used_memory
from torch import Tensor

MIN_ROUNDS, MAX_ROUNDS, SECONDS = 5, 30, 2.5


@dataclass
class Contestant:
    """``run`` makes a step, ``before`` runs ahead of each, untimed. Bytes: ``weights``, the same by the driver's count,
    and what a graph holds: by its own count and by the driver's."""

    run: Callable[[], Tensor]
    weights: int
    weights_driver: int = 0
    graph: int = 0
    graph_driver: int = 0
    before: Callable[[], object] = lambda: None


@dataclass
class Contest:
    """What came of it: milliseconds, bytes and results by the contestants' names, reasons where one failed."""

    ms: dict[str, float] = field(default_factory=dict)
    memory: dict[str, dict[str, int]] = field(default_factory=dict)
    results: dict[str, Tensor] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


def compete(makers: Mapping[str, Callable[[], Contestant]], device: torch.device, deadline: Deadline) -> Contest:
    """Makes the contestants one after another, then times all of them in turns. One that fails leaves the others be.

    Raises RuntimeError where the GPU takes no more work.
    """
    contest = Contest()
    ready: dict[str, Contestant] = {}
    estimate = 0.0
    for name, make in makers.items():
        if deadline.passed:
            contest.left_out.append(name)
            continue
        try:
            contestant = make()
            contestant.before()
            contest.results[name] = contestant.run().float()
            estimate += _seconds(contestant, device)
            contest.memory[name] = _memory(contestant, device)
            ready[name] = contestant
        except Exception as problem:
            print(f"FAILED {name}\n{traceback.format_exc(limit=-6)}", flush=True)
            contest.failures[name] = f"{type(problem).__name__}: {problem}".splitlines()[0]
            synchronize(device)
    rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, int(SECONDS / max(estimate, 1e-6)))) if device.type == "cuda" else 1
    times: dict[str, list[float]] = {name: [] for name in ready}
    for turn in range(-1 if device.type == "cuda" else 0, rounds):
        for name, contestant in ready.items():
            seconds = _seconds(contestant, device)
            if turn >= 0:  # the one before settles torch's memory
                times[name].append(seconds)
    contest.ms = {name: round(statistics.median(values) * 1e3, 4) for name, values in times.items()}
    del ready
    gc.collect()
    return contest


def _seconds(contestant: Contestant, device: torch.device) -> float:
    contestant.before()
    return call_seconds(contestant.run, device)


def _memory(contestant: Contestant, device: torch.device) -> dict[str, int]:
    """Bytes on the device: weights, what a step takes beside them, and what a graph holds; "driver" is what the driver
    gave out for it, "peak" their sum."""
    found = {"weights": contestant.weights}
    if device.type == "cpu":
        return found
    before = settled_memory(device)
    torch.cuda.reset_peak_memory_stats(device)
    allocated = torch.cuda.memory_allocated(device)
    contestant.before()
    contestant.run()
    synchronize(device)
    step, step_driver = torch.cuda.max_memory_allocated(device) - allocated, used_memory(device) - before
    return found | {
        "weights_driver": contestant.weights_driver,
        "step": step,
        "step_driver": step_driver,
        "graph": contestant.graph,
        "graph_driver": contestant.graph_driver,
        "peak": contestant.weights + step + contestant.graph_driver,
        "peak_driver": contestant.weights_driver + step_driver + contestant.graph_driver,
    }
