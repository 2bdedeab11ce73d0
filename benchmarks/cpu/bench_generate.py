"""From a prompt to a PNG on this CPU, ours beside diffusers, in turns: the text encoder, every step, the VAE, the file.

    python -m benchmarks.cpu.bench_generate /tmp/sd15-q4_0.gguf --steps 20 --output benchmarks/results/cpu-generate.json

Ours is a fresh ``gguf-sd generate`` with nothing but its defaults: Python's start, imports, opening the file and
encoding its weights are counted. diffusers' clock starts when its pipeline is in memory: bfloat16, channels-last,
random weights of the same shapes, torch's SDPA. Both take as many steps of the UNet, guided.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.cpu.bench_step import FLAGS, cpu_name, random_weights
from benchmarks.lib.baselines import diffusers_unet
from gguf_sd.checkpoint.model_file import ModelFile
from gguf_sd_kernels.cpu import processor

OURS, THEIRS = "gguf-sd", "diffusers"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="an SD 1.5 GGUF file")
    parser.add_argument("--size", type=int, default=512, help="pixels along each side")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(diffusers_seconds(args.model, args.size, args.steps))
        return
    seconds: dict[str, list[float]] = {OURS: [], THEIRS: []}
    for _ in range(args.repeats):
        seconds[OURS].append(our_seconds(args.model, args.size, args.steps))
        command = [sys.executable, "-m", "benchmarks.cpu.bench_generate", str(args.model), "--child"]
        command += ["--size", str(args.size), "--steps", str(args.steps)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        seconds[THEIRS].append(float(done.stdout.split()[-1]))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    result = {
        "date": date.today().isoformat(),
        "machine": f"{cpu_name()}, {torch.get_num_threads()} threads",
        "features": [flag for flag in FLAGS if flag in (processor.flags() or ())],
        "versions": {name: version(name) for name in ("torch", "diffusers")},
        "model": args.model.name,
        "size": args.size,
        "steps": args.steps,
        "seconds": {name: [round(value, 2) for value in values] for name, values in seconds.items()},
        "ratio_to_diffusers": round(medians[OURS] / medians[THEIRS], 3),
    }
    print(json.dumps(result, indent=2))
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")


def our_seconds(model: Path, size: int, steps: int) -> float:
    """Of the whole process."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "gguf_sd", "generate", str(model), "-p", "a lighthouse at dusk", "--quiet"]
        command += ["--steps", str(steps), "--sampler", "euler", "--seed", "1", "--device", "cpu"]
        command += ["--width", str(size), "--height", str(size), "-o", f"{folder}/out.png"]
        started = time.perf_counter()
        subprocess.run(command, check=True)
        return time.perf_counter() - started


@torch.inference_mode()
def diffusers_seconds(path: Path, size: int, steps: int) -> float:
    """Of a call of its pipeline, and of writing the picture."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel

    model, dtype = ModelFile.open(path), torch.bfloat16
    config = model.config
    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=config.vae.block_out_channels,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=config.vae.layers_per_block,
        )
    text = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)).to(dtype)
    parts: dict[str, Any] = {
        "unet": diffusers_unet(config.unet, dtype, torch.device("cpu")),
        "vae": random_weights(vae, dtype),
        "text_encoder": None,
        "tokenizer": None,
        "safety_checker": None,
        "feature_extractor": None,
        "scheduler": EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
    }
    pipeline = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        prompts = [text(torch.full((1, 77), 7)).last_hidden_state for _ in range(2)]
        picture = pipeline(
            prompt_embeds=prompts[0],
            negative_prompt_embeds=prompts[1],
            num_inference_steps=steps,
            guidance_scale=7.5,
            height=size,
            width=size,
        ).images[0]
        picture.save(f"{folder}/out.png")
        return time.perf_counter() - started


if __name__ == "__main__":
    main()
