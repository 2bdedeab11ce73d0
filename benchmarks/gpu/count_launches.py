"""How many kernels a UNet step launches, by kind, counted without a GPU.

    python -m benchmarks.gpu.count_launches --json launches.json

Triton's are counted where they are launched; torch's are its operators on the meta device, a launch each, but for
attention and copies, of which libraries may make several.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks.lib.light_meta import light_meta
from benchmarks.lib.random_weights import random_unet, unet_inputs
from benchmarks.lib.shapes import TINY_WORKLOADS, WORKLOADS, Workload
from benchmarks.lib.stand_in import META, stand_in
from gguf_sd.runtime.kernel_modes import use_kernels

AIMS = {"sd15-512": 300, "sdxl-512": 620, "sdxl-1024": 620}  # of Triton's
DTYPE = torch.float16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", action="append", choices=[*WORKLOADS, *TINY_WORKLOADS])
    parser.add_argument("--mode", default="fused", choices=("auto", "fused", "dequantize", "int8"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported
    found: dict[str, Any] = {"date": date.today().isoformat(), "mode": args.mode, "steps": {}}
    for name in args.workload or WORKLOADS:
        step = count((WORKLOADS | TINY_WORKLOADS)[name], args.mode)
        if name in AIMS:
            step["aim"] = AIMS[name]
        found["steps"][name] = step
        print(f"{name}: {step['triton_total']} launches of Triton's, {step['torch_total']} of torch's")
        for kind in ("triton", "torch"):
            print("  " + ", ".join(f"{kernel} {times}" for kernel, times in step[kind].items()))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


def count(work: Workload, mode: str) -> dict[str, Any]:
    """Launches of a step by kind, most frequent first; the work that is done once a model or prompt is not in it."""
    inputs = unet_inputs(work.config.unet, work.batch, work.size // work.config.vae.downscale, DTYPE, META)
    latents, timesteps, context, *vector = inputs
    with stand_in() as launches, light_meta() as operators, torch.inference_mode():
        unet = random_unet(work.config.unet, "Q4_0", DTYPE, META)
        use_kernels(unet, mode)
        projected = unet.project(context)
        unet.step(latents, timesteps, projected, *vector)  # what is prepared once a model is done here
        launches.clear()
        operators.clear()
        unet.step(latents, timesteps, projected, *vector)
        triton, others = Counter(launches), Counter(operators)
    return {
        "triton_total": triton.total(),
        "torch_total": others.total(),
        "triton": dict(triton.most_common()),
        "torch": dict(others.most_common()),
    }


if __name__ == "__main__":
    main()
