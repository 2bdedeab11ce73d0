"""Seconds a UNet step and a VAE decode on this CPU, ours beside diffusers' and OpenVINO's in one run, and the peak
memory.

A step is guided (a batch of two) for SD 1.5, and not (one picture, as SDXL-Turbo runs) for SDXL. The first step of a
picture computes the prompt's keys and values besides; diffusers does so at every step.

    python -m benchmarks.lib.make_checkpoint /tmp/sd15.safetensors --model sd15
    gguf-sd convert /tmp/sd15.safetensors -o /tmp/sd15-q4_0.gguf --type q4_0 --tokenizer PATH
    python -m benchmarks.cpu.bench_step /tmp/sd15-q4_0.gguf --output benchmarks/results/cpu_step.json

The contenders take turns, so that a change of the machine's mood hits all of them; figures are medians. diffusers
runs in the same dtype, and in float32, which some processors multiply faster, channels-last, with torch's SDPA, on
weights of the same shapes. With ``--openvino FOLDER``
OpenVINO runs the same UNet in bfloat16 and, quantised by nncf, in int8; the folder keeps what was converted.
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
from collections.abc import Callable, Sequence
from datetime import date
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from benchmarks.lib.baselines import diffusers_settings
from benchmarks.lib.openvino_rival import compiled_step, unet_arguments, unet_files
from gguf_sd.checkpoint.model_file import ModelFile
from gguf_sd.models.int8 import use_int8, use_int8_decoder
from gguf_sd.models.unet import UNet
from gguf_sd.runtime import host_heap
from gguf_sd.runtime.kernel_modes import make_resident
from gguf_sd.runtime.memory import choose_dtype
from gguf_sd_kernels.cpu import int8, processor

MODES = {"quantized": ("quantized", "torch"), "resident": ("resident", "torch"), "int8": ("auto", "int8")}
RIVALS = ("diffusers", "diffusers float32", "openvino bf16", "openvino int8")
CONTENDERS = (*RIVALS, *MODES, "quantized, first step", "resident, first step")
FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_bf16", "amx_int8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="an SD 1.5 or SDXL GGUF file")
    parser.add_argument("--size", type=int, default=512, help="pixels along each side")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--openvino", type=Path, metavar="FOLDER", help="run OpenVINO too; where its models lie")
    parser.add_argument("--contenders", nargs="+", default=CONTENDERS, choices=CONTENDERS)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtype = choose_dtype(args.dtype, torch.device("cpu"))

    host_heap.be_frugal(False)  # as painting has it
    # Each in a process of its own, before this one grows.
    modes = [mode for mode in MODES if mode in args.contenders and (mode != "int8" or int8.is_fast())]
    peaks = {mode: peak_memory(args.model, args.size, mode) for mode in modes}
    steps = medians(step_contenders(args.model, args.size, dtype, args.contenders, args.openvino), args.repeats)
    decodes = medians(decode_contestants(args.model, args.size, dtype), args.repeats)
    result = {
        "date": date.today().isoformat(),
        "machine": f"{cpu_name()}, {args.threads} threads",
        "features": [flag for flag in FLAGS if flag in (processor.flags() or ())],
        "versions": {
            name: version(name) for name in ("torch", "diffusers", "openvino", "nncf") if find_spec(name) is not None
        },
        "model": args.model.name,
        "size": args.size,
        "dtype": str(dtype).removeprefix("torch."),
        "step_seconds": steps,
        "step_ratio_to_diffusers": {k: round(v / steps["diffusers"], 3) for k, v in steps.items()}
        if "diffusers" in steps
        else {},
        "vae_decode_seconds": decodes,
        "vae_ratio_to_diffusers": {k: round(v / decodes["diffusers"], 3) for k, v in decodes.items()},
        "generate_peak_rss_mb": peaks,
    }
    print(json.dumps(result, indent=2))
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")


def step_contenders(
    path: Path, size: int, dtype: torch.dtype, names: Sequence[str], openvino: Path | None
) -> dict[str, Callable[[], Any]]:
    """What makes a step, by the ``names`` of those that can run here."""
    model = ModelFile.open(path)
    config = model.config.unet
    batch = 1 if config.vector_dim else 2
    latents = torch.randn(batch, config.in_channels, size // 8, size // 8).to(dtype)
    context = torch.randn(batch, 77, config.context_dim).to(dtype)
    vector = torch.randn(batch, config.vector_dim).to(dtype) if config.vector_dim else None
    timesteps = torch.full((batch,), 500)
    found: dict[str, Callable[[], Any]] = {}
    if "diffusers" in names:
        found["diffusers"] = _diffusers_step(model, latents, timesteps, context, dtype)
    if "diffusers float32" in names:
        found["diffusers float32"] = _diffusers_step(model, latents.float(), timesteps, context.float(), torch.float32)
    if openvino is not None:
        files = unet_files(config, batch, size // 8, openvino)
        arguments = unet_arguments(config, batch, size // 8)
        for kind, file in files.items():
            if f"openvino {kind}" in names:
                found[f"openvino {kind}"] = compiled_step(file, arguments, torch.get_num_threads())
    for mode in MODES:
        wanted = [name for name in names if name.partition(",")[0] == mode]
        if not wanted or (mode == "int8" and not int8.is_fast()):
            continue
        unet = model.load_unet(dtype)
        if mode == "resident":
            make_resident(unet, dtype)
        elif mode == "int8":
            with torch.no_grad():
                use_int8(unet, dtype)
        with torch.inference_mode():
            projected = unet.project(context)
        for name in wanted:
            # As the sampling loop has it: both halves of guidance are told by their prompts alone.
            step = partial(unet.step, latents[:1], timesteps[:1])
            if name == mode:
                found[name] = partial(step, projected, vector)
            else:
                found[name] = partial(_first_step, unet, step, context, vector)
    return found


def _first_step(unet: UNet, step: Callable[..., Any], context: Tensor, vector: Tensor | None) -> Any:
    return step(unet.project(context), vector)


def _diffusers_step(
    model: ModelFile, latents: Tensor, timesteps: Tensor, context: Tensor, dtype: torch.dtype
) -> Callable[[], Any]:
    config = model.config.unet
    with torch.device("meta"):
        empty = diffusers.UNet2DConditionModel(**diffusers_settings(config))
    unet: Any = random_weights(empty, dtype)
    more: dict[str, Any] = {}
    if config.vector_dim:
        pooled = config.vector_dim - 6 * 256
        more = {"added_cond_kwargs": {"text_embeds": torch.randn(1, pooled).to(dtype), "time_ids": torch.ones(1, 6)}}
    return partial(unet, latents.contiguous(memory_format=torch.channels_last), timesteps, context, **more)


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
    found = {"diffusers": lambda: theirs.decode(reordered), "gguf-sd": lambda: vae.decode(latents)}
    if int8.is_fast():
        narrow = model.load_vae(dtype)
        with torch.no_grad():
            use_int8_decoder(narrow, dtype)
        found["gguf-sd int8"] = lambda: narrow.decode(latents)
    return found


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


def peak_memory(path: Path, size: int, mode: str) -> int:
    """Peak resident memory of `gguf-sd generate`, MB (10^6 bytes), for two steps, guided or not as above."""
    weights, kernels = MODES[mode]
    guidance = "0" if ModelFile.open(path).config.unet.vector_dim else "7.5"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "gguf_sd.cli.main", "generate", str(path), "-p", "a lighthouse", "--quiet"]
        command += ["--steps", "2", "--guidance", guidance, "--seed", "1", "--device", "cpu"]
        command += ["--weights", weights, "--kernels", kernels]
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
