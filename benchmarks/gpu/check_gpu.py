"""Every kernel and mode on this GPU against float64, at the sizes of SD 1.5 and SDXL and at odd ones.

    python -m benchmarks.gpu.check_gpu --json check.json

In order: decoding and norms; every launch of every kernel, as the models call it, once; every weight of the models in
every mode, on activations of odd sizes; whole UNet steps, and their replay from CUDA graphs; every product of the
workloads at its true size, with all launches that bench_kernels.py measures. Several processes share the GPU, as most
of the time goes into compiling; what they compile stays in Triton's cache.

``--device cpu`` checks small sizes in Triton's interpreter, to test this script.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.lib.deadline import Deadline
from benchmarks.lib.device import device_name, prepare
from benchmarks.lib.kernel_checks import EPILOGUES, Job, Result, run_job
from benchmarks.lib.modes import MODES
from benchmarks.lib.shapes import WORKLOADS, Layer, step_layers
from benchmarks.lib.worker_pool import Failure, run_jobs
from gguf_sd.config import UNetConfig
from gguf_sd_kernels.devices import gpu_family, multiprocessors
from gguf_sd_kernels.tuning.launch import UNTUNED, Launch, Product, Table, candidates
from gguf_sd_kernels.tuning.launch_int8 import INT8_TYPES, UNTUNED_INT8, int8_candidates

QTYPES = ("Q4_0", "Q8_0", "Q4_1")
SHOWN = 12  # of what is wrong
ONE_LAUNCH = Launch(64, 64, 64, warps=4, stages=3)  # in bfloat16, where no PTX is used


@dataclass(frozen=True)
class Sizes:
    """What to try.

    ``samples`` are a small layer of each op, with K in at least 3 steps; ``ms`` and ``pictures`` (batch, height, width)
    the odd sizes of activations; ``step`` a small UNet and its latents' sides.
    """

    layers: tuple[Layer, ...]
    samples: tuple[Layer, ...]
    ms: tuple[int, ...]
    pictures: tuple[tuple[int, int, int], ...]
    norms: tuple[tuple[int, int, int, int], ...]  # channels, groups, height, width
    step: tuple[UNetConfig, int, int]


def convolution(n: int, channels: int, stride: int, picture: tuple[int, int, int]) -> Layer:
    """A 3x3 convolution of ``picture`` (batch, height, width)."""
    batch, height, width = picture
    pixels = batch * -(-height // stride) * -(-width // stride)
    return Layer("conv", pixels, n, 9 * channels, 9, stride, 1, (batch, channels, height, width))


def real_sizes() -> Sizes:
    small = UNetConfig(block_out_channels=(320, 640), layers_per_block=1, transformer_layers=(1, 1), num_heads=(8, 8))
    return Sizes(
        layers=tuple(dict.fromkeys(layer for work in WORKLOADS.values() for layer in step_layers(work))),
        samples=(
            Layer("linear", 333, 320, 320),
            Layer("geglu", 333, 2560, 320),
            convolution(320, 320, 1, (2, 13, 15)),
        ),
        ms=(1, 17, 77, 256, 1000),
        pictures=((1, 33, 31), (2, 9, 8), (1, 17, 64), (2, 32, 31)),
        norms=((320, 32, 64, 64), *((channels, 32, 33, 31) for channels in (320, 640, 960, 1280, 1920, 2560))),
        step=(small, 25, 24),
    )


def small_sizes() -> Sizes:
    """For the interpreter."""
    samples = (Layer("linear", 17, 32, 192), Layer("geglu", 5, 64, 192), convolution(32, 64, 1, (2, 3, 3)))
    tiny = UNetConfig(
        block_out_channels=(32, 64),
        layers_per_block=1,
        transformer_layers=(1, 0),
        num_heads=(4, 4),
        context_dim=64,
        norm_groups=8,
    )
    return Sizes(samples, samples, (1, 17), ((1, 5, 3), (2, 3, 4)), ((64, 8, 5, 3),), (tiny, 5, 4))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=150, help="start nothing new after so long")
    parser.add_argument("--processes", type=int, help="0 checks in this one (the number of cores, at most 12)")
    parser.add_argument("--qtype", action="append", choices=QTYPES, help="default: all")
    parser.add_argument("--only", action="append", help="checks of this name: dequantize, norms, launch, ptx, …")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device, deadline = prepare(args.device), Deadline(args.seconds)
    processes = min(12, os.cpu_count() or 1) if args.processes is None else args.processes
    qtypes = tuple(args.qtype or QTYPES)
    jobs = [job for job in all_jobs(device, qtypes) if not args.only or job.check in args.only]
    print(f"{len(jobs)} checks in {processes} processes on {device_name(device)}", flush=True)
    outcome = Outcome(jobs)
    for job, found in run_jobs(jobs, run_job, processes, deadline):
        outcome.add(job, found)
        if sum(outcome.done.values()) % 100 == 0:
            print(f"{outcome.headline()}, {deadline.left:.0f} s left", flush=True)
            outcome.write(args.json)
    outcome.write(args.json)
    print("\n".join(outcome.summary()))
    sys.exit(not outcome.right())


class Outcome:
    """What the checks found so far."""

    def __init__(self, jobs: list[Job]):
        self.jobs = Counter(job.check for job in jobs)
        self.done: Counter[str] = Counter()
        self.comparisons = 0
        self.wrong: list[Result] = []
        self.failures: dict[str, str] = {}  # by the check that ended without a result
        self.worst: dict[str, float] = {}  # errors by the first word of the comparisons, bfloat16 apart
        self.started = time.monotonic()

    def add(self, job: Job, found: list[Result] | Failure) -> None:
        self.done[job.check] += 1
        if isinstance(found, Failure):
            self.failures[str(job)] = found.reason
            if len(self.failures) <= SHOWN:
                print(f"FAILED {job}\n{found.reason}", flush=True)
            return
        for result in found:
            self.comparisons += 1
            if not result.ok:
                self.wrong.append(result)
                if len(self.wrong) <= SHOWN:
                    print(wrong_line(result), flush=True)
            if result.limit:  # else a mere yes or no
                kind = result.name.split()[0] + (" bf16" if "bf16" in result.name else "")
                self.worst[kind] = max(self.worst.get(kind, 0.0), result.error)

    def right(self) -> bool:
        return self.comparisons > 0 and not self.wrong and not self.failures

    def headline(self) -> str:
        seconds = time.monotonic() - self.started
        return (
            f"{sum(self.done.values())} of {sum(self.jobs.values())} checks, {self.comparisons} comparisons in "
            f"{seconds:.0f} s: {len(self.wrong)} wrong, {len(self.failures)} checks failed"
        )

    def summary(self) -> list[str]:
        failures = list(self.failures.items())[:SHOWN]
        lines = [self.headline(), *(wrong_line(result) for result in self.wrong[:SHOWN])]
        lines += [f"FAILED {name}: {reason.strip().splitlines()[-1]}" for name, reason in failures]
        lines += [f"worst of {name}: {error:.1e}" for name, error in self.worst.items()]
        if left_out := self.jobs - self.done:
            lines.append("left out: " + ", ".join(f"{count} of {name}" for name, count in left_out.items()))
        return lines

    def write(self, path: Path | None) -> None:
        if path is None:
            return
        left_out = self.jobs - self.done
        bad = bool(self.wrong or self.failures)
        target = {
            "name": "every kernel and mode is right",
            "met": False if bad else None if left_out else True,
            "detail": f"{self.comparisons} comparisons" + (", but not all that there are" if left_out else ""),
        }
        found = {
            "complete": not left_out,
            "comparisons": self.comparisons,
            "wrong": [vars(result) for result in self.wrong],
            "failures": self.failures,
            "left_out": dict(left_out),
            "summary": self.summary(),
            "targets": [target],
        }
        path.write_text(json.dumps(found, indent=1) + "\n")


def wrong_line(result: Result) -> str:
    return f"WRONG {result.name}: {result.error:.2e} > {result.limit:.0e}"


def all_jobs(device: torch.device, qtypes: tuple[str, ...]) -> list[Job]:
    """The cheap and fundamental first."""
    sizes = real_sizes() if device.type == "cuda" else small_sizes()
    calls: list[tuple[str, tuple[Any, ...]]] = []
    conv = sizes.samples[-1]
    shape = (conv.n, conv.k // 9, 3, 3)
    calls += [("dequantize", (qtype, shape)) for qtype in qtypes]
    calls += [("norms", case) for case in sizes.norms]
    calls += [("launch", arguments) for arguments in launches(device, qtypes, sizes)]
    family = gpu_family(device) or ""
    tiles = [launch for _, launch in UNTUNED[family]]
    for sample in sizes.samples:
        calls += [("ptx", (qtype, sample, tile)) for qtype in qtypes for tile in tiles]
    calls += [("unet", (qtypes[0], *sizes.step, mode)) for mode in MODES]
    calls += [("sizes", (qtype, of_weight)) for qtype in qtypes for of_weight in odd_sizes(sizes)]
    calls += [("product", (qtype, layer)) for qtype in qtypes for layer in sizes.layers]
    calls += [("unet", (qtype, *sizes.step, mode)) for qtype in qtypes[1:] for mode in MODES]
    return [Job(check, device, arguments, seed) for seed, (check, arguments) in enumerate(calls)]


def launches(device: torch.device, qtypes: tuple[str, ...], sizes: Sizes) -> Iterator[tuple[Any, ...]]:
    """Arguments of checks.launch: each of them needs a kernel compiled, and no two the same."""
    family, processors = gpu_family(device) or "", multiprocessors(device)
    tables: dict[str, tuple[Table, Callable[..., list[Launch]], tuple[str, ...]]] = {
        "fused": (UNTUNED, candidates, qtypes)
    }
    if family in UNTUNED_INT8:
        tables["int8"] = (UNTUNED_INT8, int8_candidates, tuple(q for q in qtypes if q in INT8_TYPES))
    for sample in sizes.samples:
        for way, (table, tried, types) in tables.items():
            found = dict.fromkeys(launch for _, launch in table[family])
            for layer in sizes.layers:
                if layer.op == sample.op:
                    product = Product(layer.op, "Q4_0", layer.m, layer.n, layer.k, layer.taps)
                    found |= dict.fromkeys(replace(one, splits=1) for one in tried(product, family, processors))
            for launch in found:
                for qtype in types:
                    for splits in (1, 3):
                        for epilogue in EPILOGUES[sample.op]:
                            yield way, qtype, sample, replace(launch, splits=splits), epilogue
        for qtype in qtypes:
            yield "fused", qtype, sample, ONE_LAUNCH, EPILOGUES[sample.op][-1], True


def odd_sizes(sizes: Sizes) -> Iterator[tuple[Layer, ...]]:
    """Each weight of the layers once, with activations of some of the odd sizes, other ones for the next weight."""
    weights = {(layer.op, layer.n, layer.k, layer.taps, layer.stride): layer for layer in sizes.layers}
    for index, layer in enumerate(weights.values()):
        if layer.op == "conv":
            pictures = (sizes.pictures[(index + i) % len(sizes.pictures)] for i in range(2))
            yield tuple(convolution(layer.n, layer.k // 9, layer.stride, picture) for picture in pictures)
        else:
            ms = (sizes.ms[(index + 2 * i) % len(sizes.ms)] for i in range(3))
            yield tuple(dict.fromkeys(replace(layer, m=m) for m in ms))


if __name__ == "__main__":
    main()
