"""A whole UNet step in every mode on this GPU, eager and from a CUDA graph, beside diffusers'; its memory and errors.

    python -m benchmarks.gpu.bench_step --json step.json

SD 1.5 at 512x512 with guidance (a batch of two), SDXL at 512x512 and 1024x1024 without; float16, full-size random
weights made on the device. A step is what the engine runs at every step: the prompt's keys and values are computed
once a picture, and timed apart (prompt_ms); diffusers computes them at every step.

The contenders of a workload take turns, so that a change of the machine's mood hits all of them; times are medians by
CUDA events. The floor is the step's arithmetic over the measured rate of a large product, or its weights' bytes over
that of a copy, whichever takes longer. Bytes of a step are what it allocates beside the weights, by torch's count and
by the driver's. diffusers runs channels-last with its default attention, eager, from a CUDA graph, and compiled: the
last in a process of its own, which is ended when the time is over, and after everything else.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import date
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.profile_step import breakdown, kernel_times
from benchmarks.lib import step_report
from benchmarks.lib.baselines import diffusers_unet, missing, step_of, with_gguf_linears
from benchmarks.lib.deadline import Deadline
from benchmarks.lib.device import call_seconds, device_name, measured_rates, prepare, settled_memory, synchronize
from benchmarks.lib.interleaved import MAX_ROUNDS, Contender, Interleaved, run_interleaved
from benchmarks.lib.modes import MODES, PACKED_MODES, capture_on, set_mode, switch_mode
from benchmarks.lib.random_weights import random_unet, unet_inputs, weights_bytes
from benchmarks.lib.shapes import WORKLOADS, Workload, step_gmac, workloads
from gguf_sd.config import UNetConfig
from gguf_sd.models.unet import UNet
from gguf_sd.runtime.cuda_graph import GraphedUNet, Graphing
from gguf_sd.runtime.kernel_modes import load_tables

QTYPES = ("Q4_0", "Q8_0", "Q4_1")
DIFFUSERS_QTYPES = ("Q4_0", "Q8_0")
DTYPE = torch.float16
COMPILE_SECONDS = 20  # with less time left no compilation is begun
Maker = Callable[[], Contender]


class Bench:
    """The measurements of one run, and what is shared between workloads: rates, and diffusers' UNets."""

    def __init__(self, device: torch.device, modes: tuple[str, ...], deadline: Deadline):
        self.device, self.modes, self.deadline = device, modes, deadline
        self.rates = measured_rates(device)
        self.steps: dict[str, step_report.Entry] = {}
        self.failures: dict[str, str] = {}
        self.notes: list[str] = []
        # Workloads of one model follow each other: what two of them use is made once.
        self.baseline = lru_cache(maxsize=2)(self._rival)
        self.gguf_rival = lru_cache(maxsize=1)(self._gguf_rival)
        self.unet = lru_cache(maxsize=2)(self._unet)
        for title, modules in (("diffusers", ("diffusers",)), ("diffusers GGUF", ("diffusers", "gguf"))):
            if reason := missing(*modules):
                self.notes.append(f"without {title}: {reason}")

    def main_group(self, name: str, work: Workload, qtype: str) -> None:
        """Our modes but plain torch, and diffusers eager."""
        inputs = self._inputs(work)
        makers: dict[str, Maker] = {}
        if not missing("diffusers"):
            makers["diffusers"] = partial(self._diffusers, work, inputs)
        for mode in self.modes:
            if mode != "torch":
                makers |= self._ours(work.config.unet, qtype, mode, inputs)
        self._hold(f"{name} {qtype}", work, makers)

    def other_group(self, name: str, work: Workload, qtype: str) -> None:
        """Plain torch, diffusers with GGUF linears, and diffusers from a CUDA graph."""
        inputs = self._inputs(work)
        makers: dict[str, Maker] = {}
        if "torch" in self.modes:
            makers |= self._ours(work.config.unet, qtype, "torch", inputs)
        if qtype in DIFFUSERS_QTYPES and not missing("diffusers", "gguf"):
            makers["diffusers GGUF"] = partial(self._diffusers_gguf, work, qtype, inputs)
        if qtype == QTYPES[0] and not missing("diffusers"):
            makers["diffusers graph"] = partial(self._diffusers_graph, work, inputs)
        self._hold(f"{name} {qtype}", work, makers)

    def profile(self, name: str, work: Workload, qtype: str) -> None:
        """Kernels of one fused step."""
        latents, timesteps, context, *vector = self._inputs(work)
        unet, _ = self.unet(work.config.unet, qtype, "fused")
        switch_mode(unet, "fused")
        projected = unet.project(context)
        unet.step(latents, timesteps, projected, *vector)
        times = kernel_times(lambda: unet.step(latents, timesteps, projected, *vector))
        self._entry(f"{name} {qtype}", work)["profile"] = breakdown(times)

    def compiled(self, name: str, work: Workload) -> None:
        """diffusers compiled, by another process that is ended in time."""
        seconds = self.deadline.left
        if missing("diffusers") or seconds < COMPILE_SECONDS:
            self.notes.append(f"diffusers compiled was left out for {name}: {max(seconds, 0):.0f} s were left")
            return
        command = [sys.executable, "-m", "benchmarks.gpu.bench_step", "--device", str(self.device), "--compiled", name]
        with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(command, stdout=output, stderr=errors, start_new_session=True)
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                self.notes.append(f"diffusers compiled was left out for {name}: not done after {seconds:.0f} s")
                return
            finally:
                stop_group(process)
            output.seek(0), errors.seek(0)
            if process.returncode:
                reason = (errors.read().strip().splitlines() or [f"exit status {process.returncode}"])[-1]
                self.notes.append(f"diffusers compiled failed for {name}: {reason}")
                return
            self._entry(f"{name} {QTYPES[0]}", work)["diffusers_compiled"] = json.loads(output.readlines()[-1])

    def failed(self, what: str, problem: Exception) -> None:
        print(f"FAILED {what}\n{traceback.format_exc(limit=-6)}", flush=True)
        self.failures[what] = f"{type(problem).__name__}: {problem}".splitlines()[0]

    def result(self) -> dict[str, Any]:
        table = [line for key, entry in self.steps.items() for line in step_report.lines(key, entry)]
        failed = [f"FAILED {what}: {reason}" for what, reason in self.failures.items()]
        rates = f"measured: {self.rates.tflops:.0f} TFLOP/s float16 product, {self.rates.gbytes:.0f} GB/s copy"
        return {
            "date": date.today().isoformat(),
            "gpu": device_name(self.device),
            "rates": {"matmul_tflops": round(self.rates.tflops, 1), "copy_gbytes": round(self.rates.gbytes, 1)},
            "steps": self.steps,
            "failures": self.failures,
            "notes": self.notes,
            "targets": step_report.targets(self.steps),
            "summary": [rates, *table, "", *self.notes, *failed],
        }

    def _inputs(self, work: Workload) -> list[Tensor]:
        torch.manual_seed(1)
        side = work.size // work.config.vae.downscale
        return unet_inputs(work.config.unet, work.batch, side, DTYPE, self.device)

    def _rival(self, config: UNetConfig) -> tuple[nn.Module, int]:
        before = settled_memory(self.device)
        unet = diffusers_unet(config, DTYPE, self.device)
        return unet, settled_memory(self.device) - before

    def _diffusers(self, work: Workload, inputs: list[Tensor]) -> Contender:
        unet, driver = self.baseline(work.config.unet)
        return Contender(step_of(unet, inputs), weights_bytes(unet), driver)

    def _diffusers_graph(self, work: Workload, inputs: list[Tensor]) -> Contender:
        unet, driver = self.baseline(work.config.unet)
        before = settled_memory(self.device)
        replay = capture_on(self.device)(step_of(unet, inputs))
        held = settled_memory(self.device) - before
        return Contender(replay, weights_bytes(unet), driver, graph=held, graph_driver=held)

    def _gguf_rival(self, config: UNetConfig, qtype: str) -> tuple[nn.Module, int]:
        before = settled_memory(self.device)
        unet = with_gguf_linears(diffusers_unet(config, DTYPE, self.device), qtype)
        return unet, settled_memory(self.device) - before

    def _diffusers_gguf(self, work: Workload, qtype: str, inputs: list[Tensor]) -> Contender:
        unet, driver = self.gguf_rival(work.config.unet, qtype)
        return Contender(step_of(unet, inputs), weights_bytes(unet), driver)

    def _unet(self, config: UNetConfig, qtype: str, mode: str) -> tuple[UNet, int]:
        """Our UNet handed to ``mode``, and the bytes that the driver gave out for it."""
        before = settled_memory(self.device)
        unet = set_mode(random_unet(config, qtype, DTYPE, self.device), mode)
        return unet, settled_memory(self.device) - before

    def _ours(self, config: UNetConfig, qtype: str, mode: str, inputs: list[Tensor]) -> dict[str, Maker]:
        """``mode`` eager, its work once a prompt, and from a graph."""
        latents, timesteps, context, *vector = inputs

        def made() -> tuple[UNet, int]:
            return self.unet(config, qtype, "fused" if mode in PACKED_MODES else mode)

        def switch(unet: UNet) -> None:
            if mode in PACKED_MODES:
                switch_mode(unet, mode)

        def eager() -> Contender:
            unet, driver = made()
            switch(unet)
            projected = unet.project(context)
            run = partial(unet.step, latents, timesteps, projected, *vector)
            return Contender(run, weights_bytes(unet), driver, before=partial(switch, unet))

        def prompt() -> Contender:
            unet, driver = made()
            return Contender(partial(unet.project, context), weights_bytes(unet), driver, before=partial(switch, unet))

        def graph() -> Contender:
            unet, driver = made()
            switch(unet)
            projected = unet.project(context)
            before = settled_memory(self.device)
            graphed = GraphedUNet(unet, capture_on(self.device), Graphing("on"))
            run = partial(graphed.step, latents, timesteps, projected, *vector)
            run()
            held = settled_memory(self.device) - before
            return Contender(run, weights_bytes(unet), driver, graph=graphed.nbytes, graph_driver=held)

        return {mode: eager, f"{mode} prompt": prompt, f"{mode} graph": graph}

    def _entry(self, key: str, work: Workload) -> step_report.Entry:
        empty: dict[str, Any] = {kind: {} for kind in ("ms", "prompt_ms", "memory", "errors", "finite")}
        return self.steps.setdefault(key, {"gmac": round(step_gmac(work), 1)} | empty)

    def _hold(self, key: str, work: Workload, makers: dict[str, Maker]) -> None:
        interleaved = run_interleaved(makers, self.device, self.deadline)
        entry = self._entry(key, work)
        for name, milliseconds in interleaved.ms.items():
            if name.endswith(" prompt"):
                entry["prompt_ms"][name.removesuffix(" prompt")] = milliseconds
            else:
                entry["ms"][name], entry["memory"][name] = milliseconds, interleaved.memory[name]
        entry["finite"] |= {name: bool(result.isfinite().all()) for name, result in interleaved.results.items()}
        entry["errors"] |= errors(interleaved)
        floors = {
            name: self.rates.floor_ms(entry["gmac"], memory["weights"]) for name, memory in entry["memory"].items()
        }
        step_report.relate(entry, floors)
        for name, reason in interleaved.failures.items():
            if name.startswith("diffusers"):
                self.notes.append(f"{key} {name} failed: {reason}")
            else:
                self.failures[f"{key} {name}"] = reason
        if interleaved.left_out:
            self.notes.append(f"out of time, left out of {key}: {', '.join(interleaved.left_out)}")


def errors(interleaved: Interleaved) -> dict[str, float]:
    """Relative errors of the modes against each other, for the same weights and inputs."""
    pairs = [(mode, "resident") for mode in ("fused", "dequantize", "auto", "int8")]
    pairs += [("int8", "fused"), *((f"{mode} graph", mode) for mode in MODES)]
    found = {}
    for one, other in pairs:
        if one in interleaved.results and other in interleaved.results:
            want = interleaved.results[other]
            found[f"{one} against {other}"] = float((interleaved.results[one] - want).norm() / want.norm())
    return found


def stop_group(process: subprocess.Popen[Any]) -> None:
    """Ends a process with those it started: compilers work in processes of their own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@torch.no_grad()
def compile_rival(work: Workload, device: torch.device) -> dict[str, Any]:
    """diffusers compiled by torch.compile, launched eagerly and from a CUDA graph, beside diffusers eager."""
    torch.manual_seed(1)
    side = work.size // work.config.vae.downscale
    inputs = unet_inputs(work.config.unet, work.batch, side, DTYPE, device)
    unet = diffusers_unet(work.config.unet, DTYPE, device)
    runs = {"diffusers": step_of(unet, inputs), "compiled": step_of(torch.compile(unet), inputs)}
    started = time.monotonic()
    runs["compiled"]()
    synchronize(device)
    found: dict[str, Any] = {"compile_seconds": round(time.monotonic() - started, 1)}
    runs["compiled graph"] = capture_on(device)(runs["compiled"])
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(-2, MAX_ROUNDS):
        for name, run in runs.items():
            seconds = call_seconds(run, device)
            if turn >= 0:
                times[name].append(seconds * 1e3)
    ms = {name: round(statistics.median(values), 4) for name, values in times.items()}
    ratios = {name: round(ms["diffusers"] / t, 3) for name, t in ms.items()}
    return found | {"ms": ms, "times_as_fast_as_diffusers": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cpu runs a tiny UNet, to test this script")
    parser.add_argument("--seconds", type=float, default=180, help="start nothing new after so long")
    parser.add_argument("--workload", action="append", help=f"of {', '.join(WORKLOADS)}; default: all")
    parser.add_argument("--qtype", action="append", choices=QTYPES, help="default: all")
    parser.add_argument("--mode", action="append", choices=MODES, help="default: all")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="without diffusers compiled")
    parser.add_argument("--compiled", help="only compile diffusers for this workload, and print its times")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device, deadline = prepare(args.device), Deadline(args.seconds)
    torch.backends.cudnn.benchmark = True  # the baselines at their best
    works = workloads(device)
    if args.compiled:
        print(json.dumps(compile_rival(works[args.compiled], device)))
        return
    works = {name: works[name] for name in args.workload or works}
    measured = load_tables(device) if device.type == "cuda" else 0
    with torch.inference_mode():
        bench = Bench(device, tuple(args.mode or MODES), deadline)
        bench.notes.append(f"mode auto goes by {measured} measured products")
        run_all(bench, works, args.qtype or QTYPES, args.json)
        if args.compile:
            for name, work in works.items():
                bench.compiled(name, work)
        write(args.json, bench)
    print("\n".join(bench.result()["summary"]))
    sys.exit(bool(bench.failures) or not bench.steps)


def run_all(bench: Bench, works: dict[str, Workload], qtypes: tuple[str, ...], path: Path | None) -> None:
    """The most important first, the results so far written after each."""
    first, *others = qtypes
    groups = (bench.main_group, bench.other_group)
    tasks = [(task, name, first) for task in (bench.main_group, bench.profile, bench.other_group) for name in works]
    tasks += [(task, name, qtype) for qtype in others for task in groups for name in works]
    for task, name, qtype in tasks:
        what = f"{name} {qtype} {task.__name__}"
        if bench.deadline.passed:
            bench.notes.append(f"out of time, left out: {what}")
            continue
        print(f"{what}, {bench.deadline.left:.0f} s left", flush=True)
        try:
            task(name, works[name], qtype)
        except Exception as problem:
            bench.failed(what, problem)
        write(path, bench)


def write(path: Path | None, bench: Bench) -> None:
    if path:
        path.write_text(json.dumps(bench.result(), indent=1) + "\n")


if __name__ == "__main__":
    main()
