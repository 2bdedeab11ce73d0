"""What the measurements ran on: GPU, driver, processor, versions, date; and where its table for mode "auto" belongs.

    python -m benchmarks.gpu.machine --json machine.json

Fails where torch or triton is missing, or no GPU can be used.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from datetime import datetime
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.lib.device import device_name, prepare, synchronize
from gguf_sd_kernels.cache_folder import cache_folder
from gguf_sd_kernels.devices import gpu_family
from gguf_sd_kernels.tuning.launch import table_name

PACKAGES = ("torch", "triton", "numpy", "transformers", "safetensors", "Pillow", "gguf", "diffusers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = prepare(args.device)
    import_module("triton")
    torch.ones(1, device=device).add_(1)
    synchronize(device)
    gpu = device_name(device)
    found: dict[str, Any] = {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "gpu": gpu,
        "family": gpu_family(device),
        "processor": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "cuda": torch.version.cuda or torch.version.hip,
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "commit": output("git", "rev-parse", "--short", "HEAD"),
        "versions": {name: installed(name) for name in PACKAGES},
        "table": str(cache_folder() / "tables" / table_name(gpu)),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["capability"] = f"{properties.major}.{properties.minor}"
        found["multiprocessors"] = properties.multi_processor_count
        found["memory_gb"] = round(properties.total_memory / 1e9, 1)
    print(json.dumps(found, indent=1))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def output(*command: str) -> str:
    """What a command prints; empty where it cannot."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


if __name__ == "__main__":
    main()
