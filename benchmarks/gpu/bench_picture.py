"""The same pictures of the built-in demo model in every mode on this GPU, against plain torch in float32 on the CPU.

    python -m benchmarks.gpu.bench_picture --json picture.json --sheet pictures.png

Both start from the same noise, drawn on the CPU in float16. Modes in 16 bits have to reach a PSNR of 35 dB against the
reference; int8's is reported. A picture from a CUDA graph equals the one without to the bit. Modes run in processes of
their own, side by side, as the time goes into compiling kernels of the demo model's sizes. Needs gguf.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.lib.baselines import missing
from benchmarks.lib.deadline import Deadline
from benchmarks.lib.device import prepare
from benchmarks.lib.modes import MODES
from benchmarks.lib.worker_pool import Failure, run_jobs
from gguf_sd.demo import model_folder
from gguf_sd.demo.sheet import contact_sheet
from gguf_sd.quality import psnr
from gguf_sd.sampling import NoiseSource

PROMPTS = (
    "a red circle above a blue square",
    "a yellow triangle left of a purple ring",
    "a cyan ring below a red triangle on a white background",
    "a purple square on a grey background",
)
QTYPE = "q4_0"
GOAL = 35.0  # dB
REFERENCE = "CPU float32"


@dataclass(frozen=True)
class Job:
    """Pictures of a model in one mode: ``kernels`` and ``graph`` as gguf_sd.Pipeline.load takes them."""

    title: str
    model: str
    device: str
    dtype: str
    kernels: str
    graph: str
    prompts: tuple[str, ...]
    steps: int | None


class HalfNoise(NoiseSource):
    """Noise that is the same in every dtype: drawn in float16, then converted."""

    def __call__(self, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        return super().__call__(shape, torch.float16).to(dtype or self.dtype)


def paint(job: Job) -> list[Image.Image]:
    """The job's pictures; seed i for prompt i."""
    from gguf_sd.pipeline import Pipeline
    from gguf_sd.request import Request

    pipeline = Pipeline.load(job.model, job.device, job.dtype, kernels=job.kernels, cuda_graph=job.graph)
    pictures = []
    for seed, prompt in enumerate(job.prompts):
        task = pipeline.prepare(Request(prompt, seed=seed, steps=job.steps))
        noise = HalfNoise([seed], pipeline.dtype, pipeline.device)
        conditioning = pipeline.encode(task)
        start = pipeline.begin(task, noise)
        latents = start.latents
        for step in pipeline.denoise(task, start, conditioning, noise):
            latents = step.latents
        pictures.append(Image.fromarray(pipeline.decode(latents)[0].numpy()))
    return pictures


def all_jobs(model: Path, device: torch.device, prompts: tuple[str, ...], steps: int | None) -> list[Job]:
    """The reference, every mode, and those that the kernels serve from a CUDA graph too."""
    jobs = [Job(REFERENCE, str(model), "cpu", "float32", "torch", "off", prompts, steps)]
    # Without a GPU the engine runs no kernels: plain torch stands in, to test this script.
    for mode in MODES if device.type == "cuda" else ("torch",):
        jobs.append(Job(mode, str(model), str(device), "float16", mode, "off", prompts, steps))
        if device.type == "cuda" and mode != "torch":
            jobs.append(Job(f"{mode} graph", str(model), str(device), "float16", mode, "on", prompts, steps))
    return jobs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cpu paints in plain torch only, to test this script")
    parser.add_argument("--seconds", type=float, default=60, help="start nothing new after so long")
    parser.add_argument("--processes", type=int, help="0 paints in this one (default: the number of cores, at most 12)")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help="how many to paint")
    parser.add_argument("--steps", type=int, help="sampling steps (default: the model's own)")
    parser.add_argument("--sheet", type=Path, help="PNG of all pictures side by side")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device, deadline = prepare(args.device), Deadline(args.seconds)
    if reason := missing("gguf", "transformers"):
        finish(args.json, {"summary": [f"no pictures: {reason}"], "targets": targets({}, {})}, status=0)
    prompts = PROMPTS[: args.prompts]
    processes = min(12, os.cpu_count() or 1) if args.processes is None else args.processes
    pictures: dict[str, list[Image.Image]] = {}
    failures: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / f"demo-{QTYPE}.gguf"
        convert_demo(model)
        jobs = all_jobs(model, device, prompts, args.steps)
        for job, outcome in run_jobs(jobs, paint, processes, deadline):
            if isinstance(outcome, Failure):
                print(f"FAILED {job.title}\n{outcome.reason}", flush=True)
                failures[job.title] = outcome.reason.strip().splitlines()[-1]
            else:
                pictures[job.title] = outcome
    titles = [job.title for job in jobs if job.title in pictures]
    quality = compared(pictures)
    same = same_from_graph(pictures)
    left_out = [job.title for job in jobs if job.title not in pictures and job.title not in failures]
    summary = [f"pictures of the demo model, {QTYPE}, {len(prompts)} prompts, PSNR against {REFERENCE}:"]
    summary += [f"  {title:18} {min(values):6.1f} dB at least" for title, values in quality.items()]
    summary += [f"  {title} {'equals' if equal else 'DIFFERS from'} the one without" for title, equal in same.items()]
    summary += [f"FAILED {title}: {reason}" for title, reason in failures.items()]
    summary += [f"out of time, left out: {', '.join(left_out)}"] if left_out else []
    if args.sheet and titles:
        columns = [(title, f"{min(quality[title]):.1f} dB" if title in quality else "reference") for title in titles]
        contact_sheet(prompts, columns, [pictures[title] for title in titles]).save(args.sheet)
    found: dict[str, Any] = {
        "psnr": {title: [round(value, 2) for value in values] for title, values in quality.items()},
        "graph_equal": same,
        "failures": failures,
        "left_out": left_out,
        "summary": summary,
        "targets": targets(quality, same),
    }
    wrong = any(target["met"] is False for target in found["targets"])
    finish(args.json, found, status=int(bool(wrong or failures or REFERENCE not in pictures)))


def finish(path: Path | None, found: dict[str, Any], status: int) -> None:
    if path:
        path.write_text(json.dumps(found, indent=1) + "\n")
    print("\n".join(found["summary"]))
    sys.exit(status)


def convert_demo(path: Path) -> None:
    from gguf_sd_convert.convert import ConvertOptions, convert

    convert(model_folder(), path, ConvertOptions(type=QTYPE))


def compared(pictures: dict[str, list[Image.Image]]) -> dict[str, list[float]]:
    """PSNR of each picture against the reference's, dB, at most 99 (equal), by mode."""
    references = pictures.get(REFERENCE, [])
    return {
        title: [min(99.0, psnr(one, other)) for one, other in zip(painted, references, strict=True)]
        for title, painted in pictures.items()
        if title != REFERENCE and references
    }


def same_from_graph(pictures: dict[str, list[Image.Image]]) -> dict[str, bool]:
    return {
        f"{mode} graph": all(
            np.array_equal(np.asarray(one), np.asarray(other))
            for one, other in zip(pictures[mode], pictures[f"{mode} graph"], strict=True)
        )
        for mode in MODES
        if mode in pictures and f"{mode} graph" in pictures
    }


def targets(quality: dict[str, list[float]], same: dict[str, bool]) -> list[dict[str, Any]]:
    exact = {title: min(values) for title, values in quality.items() if not title.startswith("int8")}
    return [
        {
            "name": f"demo pictures in 16 bits within {GOAL:.0f} dB of float32 on the CPU",
            "met": all(value >= GOAL for value in exact.values()) if exact else None,
            "detail": ", ".join(f"{title} {value:.1f}" for title, value in exact.items()),
        },
        {
            "name": "pictures from a CUDA graph equal those without",
            "met": all(same.values()) if same else None,
            "detail": ", ".join(title for title, equal in same.items() if not equal),
        },
    ]


if __name__ == "__main__":
    main()
