"""Seconds a UNet step and a VAE decode on this CPU, ours beside diffusers' in one run, and the peak memory.

A step is guided (a batch of two) for SD 1.5, and not (one picture, as SDXL-Turbo runs) for SDXL. The first step of a
picture computes the prompt's keys and values besides; diffusers does so at every step.

    python -m benchmarks.lib.make_checkpoint /tmp/sd15.safetensors --model sd15
    gguf-sd convert /tmp/sd15.safetensors -o /tmp/sd15-q4_0.gguf --type q4_0 --tokenizer PATH
    python -m benchmarks.cpu.bench_step /tmp/sd15-q4_0.gguf --output benchmarks/results/cpu_step.json

The contenders take turns, so that a change of the machine's mood hits all of them; figures are medians. diffusers
runs in the same dtype, channels-last, with torch's SDPA, on weights of the same shapes.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import diffusers
import torch

from benchmarks.lib.baselines import diffusers_settings
from gguf_sd.checkpoint.model_file import ModelFile
from gguf_sd.runtime.kernel_modes import make_resident
from gguf_sd.runtime.memory import choose_dtype

MODES = ("quantized", "resident")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="an SD 1.5 or SDXL GGUF file")
    parser.add_argument("--size", type=int, default=512, help="pixels along each side")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtype = choose_dtype(args.dtype, torch.device("cpu"))

    # Each in a process of its own, before this one grows.
    peaks = {mode: peak_memory(args.model, args.size, mode) for mode in MODES}
    steps = medians(step_contenders(args.model, args.size, dtype), args.repeats)
    decodes = medians(decode_contestants(args.model, args.size, dtype), args.repeats)
    result = {
        "date": date.today().isoformat(),
        "machine": f"{cpu_name()}, {args.threads} threads",
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
        "model": args.model.name,
        "size": args.size,
        "dtype": str(dtype).removeprefix("torch."),
        "step_seconds": steps,
        "step_ratio_to_diffusers": {k: round(v / steps["diffusers"], 3) for k, v in steps.items()},
        "vae_decode_seconds": decodes,
        "vae_ratio_to_diffusers": {k: round(v / decodes["diffusers"], 3) for k, v in decodes.items()},
        "generate_peak_rss_mb": peaks,
    }
    print(json.dumps(result, indent=2))
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")


def step_contenders(path: Path, size: int, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    model = ModelFile.open(path)
    config = model.config.unet
    batch = 1 if config.vector_dim else 2
    latents = torch.randn(batch, config.in_channels, size // 8, size // 8).to(dtype)
    context = torch.randn(batch, 77, config.context_dim).to(dtype)
    vector = torch.randn(batch, config.vector_dim).to(dtype) if config.vector_dim else None
    timesteps = torch.full((batch,), 500)
    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel(**diffusers_settings(config))
    theirs = random_weights(theirs, dtype)
    more: dict[str, Any] = {}
    if config.vector_dim:
        pooled = config.vector_dim - 6 * 256
        more = {"added_cond_kwargs": {"text_embeds": torch.randn(1, pooled).to(dtype), "time_ids": torch.ones(1, 6)}}
    quantized, resident = model.load_unet(dtype), model.load_unet(dtype)
    make_resident(resident, dtype)
    reordered = latents.contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        projected = resident.project(context)
    return {
        "diffusers": lambda: theirs(reordered, timesteps, context, **more),
        "quantized": lambda: quantized.step(latents, timesteps, projected, vector),
        "resident": lambda: resident.step(latents, timesteps, projected, vector),
        "quantized, first step": lambda: quantized(latents, timesteps, context, vector),
        "resident, first step": lambda: resident(latents, timesteps, context, vector),
    }


def decode_contestants(path: Path, size: int, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    model = ModelFile.open(path)
    vae = model.load_vae(dtype)
    with torch.device("meta"):
        empty = diffusers.AutoencoderKL(
            block_out_channels=model.config.vae.block_out_channels,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=model.config.vae.layers_per_block,
        )
    theirs: Any = random_weights(empty, dtype)
    latents = torch.randn(1, 4, size // 8, size // 8).to(dtype)
    reordered = latents.contiguous(memory_format=torch.channels_last)
    return {"diffusers": lambda: theirs.decode(reordered), "gguf-sd": lambda: vae.decode(latents)}


def random_weights(module: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    module = module.to_empty(device="cpu").to(dtype).eval()
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.02)
    return module


@torch.inference_mode()
def medians(contenders: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each, taking turns, after one round to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats + 1):
        for name, run in contenders.items():
            started = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return {name: round(statistics.median(values), 3) for name, values in seconds.items()}


def peak_memory(path: Path, size: int, weights: str) -> int:
    """Peak resident memory of `gguf-sd generate`, MB (10^6 bytes), for two steps, guided or not as above."""
    guidance = "0" if ModelFile.open(path).config.unet.vector_dim else "7.5"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "gguf_sd.cli.main", "generate", str(path), "-p", "a lighthouse", "--quiet"]
        command += ["--steps", "2", "--guidance", guidance, "--seed", "1", "--weights", weights, "--device", "cpu"]
        command += ["--width", str(size), "--height", str(size), "-o", f"{folder}/out.png"]
        probe = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True)"
        probe += "; print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
        done = subprocess.run([sys.executable, "-c", probe, *command], check=True, capture_output=True, text=True)
    return round(int(done.stdout.split()[-1]) * 1024 / 1e6)


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
