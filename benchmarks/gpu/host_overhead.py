"""What a UNet step costs the host: Python's time with every launch left out, beside diffusers' on the same machine.

    python -m benchmarks.gpu.host_overhead --json host.json

No GPU is needed, and none is used: full-size models on the meta device, Triton's launches counted in place of made, and
torch's operators replaced by ones that only allocate (benchmarks.lib.light_meta). What Triton and the driver do to
launch a kernel comes on top, for diffusers what CUDA, cuBLAS and cuDNN do.

Both steps take turns in one process, on one thread. Times are the processor's, not the wall's, and the least of all
turns, so that what else runs on the machine counts little.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.lib.baselines import diffusers_unet, missing, step_of
from benchmarks.lib.light_meta import light_meta
from benchmarks.lib.random_weights import random_unet, unet_inputs
from benchmarks.lib.shapes import TINY_WORKLOADS, WORKLOADS, Workload
from benchmarks.lib.stand_in import META, stand_in
from gguf_sd.runtime.kernel_modes import use_kernels

TARGETS_MS = {"sd15-512": 8.0, "sdxl-512": 18.0, "sdxl-1024": 18.0}
DTYPE = torch.float16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", action="append", choices=[*WORKLOADS, *TINY_WORKLOADS])
    parser.add_argument("--mode", default="fused", choices=("auto", "fused", "dequantize", "int8"))
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported
    torch.set_num_threads(1)
    results = {}
    for name in args.workload or ("sd15-512", "sdxl-1024"):
        results[name] = measure((WORKLOADS | TINY_WORKLOADS)[name], args.mode, args.rounds, TARGETS_MS.get(name))
        print(name, json.dumps(results[name]), flush=True)
    if args.json:
        found = {
            "date": date.today().isoformat(),
            "processor": processor(),
            "versions": {
                package: version(package) for package in ("torch", "triton", "diffusers") if installed(package)
            },
            "mode": args.mode,
            "rounds": args.rounds,
            "steps": results,
        }
        args.json.write_text(json.dumps(found, indent=1) + "\n")


def measure(work: Workload, mode: str, rounds: int, target: float | None = None) -> dict[str, Any]:
    """Milliseconds of a step of ours and of diffusers', and the Triton launches of ours."""
    inputs = unet_inputs(work.config.unet, work.batch, work.size // work.config.vae.downscale, DTYPE, META)
    latents, timesteps, context, *vector = inputs
    with stand_in() as launches, light_meta(), torch.inference_mode():
        unet = random_unet(work.config.unet, "Q4_0", DTYPE, META)
        use_kernels(unet, mode)
        projected = unet.project(context)
        steps: dict[str, Callable[[], object]] = {"ours": partial(unet.step, latents, timesteps, projected, *vector)}
        if not missing("diffusers"):
            steps["diffusers"] = step_of(diffusers_unet(work.config.unet, DTYPE, META), inputs)
        for step in steps.values():
            step()
        launches.clear()
        steps["ours"]()
        count = launches.total()
        best = least_times(steps, rounds)
    ms = {name: round(seconds * 1e3, 2) for name, seconds in best.items()}
    found: dict[str, Any] = {"ms": ms, "launches": count, "us_a_launch": round(best["ours"] / count * 1e6, 1)}
    if target:
        found |= {"target_ms": target, "met": ms["ours"] <= target}
    if "diffusers" in ms:
        found["of_diffusers"] = round(best["ours"] / best["diffusers"], 3)
    return found


def least_times(steps: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The processor's seconds of each step, the least of ``rounds`` turns."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, step in steps.items():
                started = time.process_time()
                step()
                times[name].append(time.process_time() - started)
    finally:
        gc.enable()
    return {name: min(values) for name, values in times.items()}


def processor() -> str:
    """The processor's name, as Linux gives it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def installed(package: str) -> bool:
    return not missing(package)


if __name__ == "__main__":
    main()
