"""What products in 8 bits do to pictures: the demo model on a CPU, beside the same file in float32.

    python -m benchmarks.cpu.int8_quality --output benchmarks/results/int8_quality.json

Prompts are those that the demo model was not trained on; each picture has the seed of its number.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from benchmarks.cpu.bench_step import cpu_name
from gguf_sd import Pipeline
from gguf_sd.demo import model_folder
from gguf_sd.demo.check import held_out_prompts, judge
from gguf_sd.demo.world import parse
from gguf_sd.quality import psnr
from gguf_sd_convert.convert import ConvertOptions, convert

TYPES = ("f16", "q8_0", "q4_1", "q4_0")
WAYS = {"float32": ("float32", "torch"), "bfloat16": ("bfloat16", "torch"), "int8": ("auto", "int8")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=64, help="prompts")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--types", nargs="+", default=TYPES, choices=TYPES)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    prompts = held_out_prompts(args.count // 4, args.count - args.count // 4)
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in tqdm(args.types, unit="type"):
            path = Path(folder) / f"{kind}.gguf"
            convert(model_folder(), path, ConvertOptions(type=kind))
            rows[kind] = compared({way: paint(path, prompts, args.batch, *how) for way, how in WAYS.items()}, prompts)
    result = {
        "date": date.today().isoformat(),
        "machine": cpu_name(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "prompts": len(prompts),
        "types": rows,
    }
    print(json.dumps(result, indent=2))
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")


def paint(path: Path, prompts: list[str], batch: int, dtype: str, kernels: str) -> list[Image.Image]:
    pipeline = Pipeline.load(path, device="cpu", dtype=dtype, kernels=kernels)
    return pipeline(prompts, batch=batch, seed=0)


def compared(pictures: dict[str, list[Image.Image]], prompts: list[str]) -> dict[str, Any]:
    """By way: PSNR against float32's pictures, and the share of those that show what the prompt says."""
    rows = {}
    for way, painted in pictures.items():
        right = [judge(picture, parse(prompt)).all for picture, prompt in zip(painted, prompts, strict=True)]
        row: dict[str, float] = {"right": round(sum(right) / len(right), 4)}
        if way != "float32":
            values = [psnr(a, b) for a, b in zip(painted, pictures["float32"], strict=True)]
            row |= {"psnr_median_db": round(statistics.median(values), 2), "psnr_least_db": round(min(values), 2)}
        rows[way] = row
    return rows


if __name__ == "__main__":
    main()
