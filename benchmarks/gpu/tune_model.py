"""What a user's first picture does on this GPU: kernels checked in a process of their own, products measured.

    python -m benchmarks.gpu.tune_model --json tune.json --seconds 60

On SD 1.5's products at 512x512 in Q4_0, with random weights; fails where a kernel is set aside, or none is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch

from benchmarks.lib.device import prepare
from benchmarks.lib.random_weights import random_unet
from benchmarks.lib.shapes import workloads
from gguf_sd.cli.tune import describe, table
from gguf_sd.runtime.kernel_modes import use_kernels
from gguf_sd.runtime.tuning import DEFAULT_SECONDS, Tuning
from gguf_sd_kernels.devices import gpu_of
from gguf_sd_kernels.tuning.verdicts import SWITCH, verdicts_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cpu runs Triton's interpreter, to test this script")
    parser.add_argument("--qtype", default="Q4_0")
    parser.add_argument("--seconds", type=float, default=2 * DEFAULT_SECONDS, help="half of them to measure in")
    parser.add_argument("--json", type=Path, help="results")
    args = parser.parse_args()
    device, started = prepare(args.device), time.monotonic()
    os.environ[SWITCH] = "1"
    (name, work), *_ = workloads(device).items()
    unet = random_unet(work.config.unet, args.qtype, torch.float16, device)
    use_kernels(unet, "auto")
    side = work.size // work.config.vae.downscale
    tuning = Tuning(min(DEFAULT_SECONDS, args.seconds / 2), quiet=True, again=True)
    tuned = tuning.prepare(unet, work.batch, side, side, torch.float16)
    found = describe(tuned, gpu_of(device).name)
    verdicts = verdicts_of(device).known
    aside = {str(subject): reason for subject, reason in verdicts.items() if reason}
    measured = sum("share" in row for row in found["products"])
    summary = [
        f"{name} {args.qtype}: {len(verdicts) - len(aside)} kernels agree with plain torch, {len(aside)} are set aside",
        *(f"set aside: {subject}: {reason}" for subject, reason in aside.items()),
        f"{measured} of {len(found['products'])} products measured; {time.monotonic() - started:.0f} s in all",
    ]
    print(table(found), *summary, sep="\n")
    if args.json:
        args.json.write_text(json.dumps(found | {"set_aside": aside, "summary": summary}, indent=1) + "\n")
    sys.exit(bool(aside) or not measured)


if __name__ == "__main__":
    main()
