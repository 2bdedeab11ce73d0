"""What `gguf-sd generate` was planned to take and what it took, on a CPU: the peak resident memory of a fresh process.

    python -m benchmarks.lib.make_checkpoint /tmp/sd15.safetensors --model sd15
    gguf-sd convert /tmp/sd15.safetensors -o /tmp/sd15-q4_0.gguf --type q4_0 --tokenizer PATH
    python -m benchmarks.cpu.bench_memory --models sd15=/tmp/sd15-q4_0.gguf --budgets 0.8GB 1GB 1.5GB 2GB 3GB 6GB
    python -m benchmarks.cpu.bench_memory --models sd15=/tmp/sd15-q4_0.gguf --sizes 512 768 1024 --batches 1 2 4
    python -m benchmarks.cpu.memory_table     # the README's

Two batches of one step are painted, so that the second runs beside all parts that stay loaded. A budget that nothing
fits is refused; the row says so. Results are added to those that the JSON file has, under model, size, batch and
budget; ``over_budget`` is the share above the budget, ``error`` that of the plan above what was measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.cpu.bench_step import cpu_name
from gguf_sd.checkpoint.model_file import ModelFile
from gguf_sd.memory_size import parse_memory

RESULTS = Path(__file__).parents[1] / "results" / "memory-cpu.json"
ALLOWED_OVER, ALLOWED_ERROR = 0.05, 0.10


@dataclass(frozen=True)
class Case:
    name: str
    path: Path
    size: int
    batch: int
    budget: str  # as for --max-memory; auto: what is free
    steps: int = 1
    options: str = ""  # more of generate's

    @property
    def key(self) -> str:
        more = (f" {self.steps} steps" if self.steps > 1 else "") + (f" {self.options}" if self.options else "")
        return f"{self.name} {self.size}x{self.size} batch {self.batch} {self.budget}{more}"


def measure(case: Case, batches: int, dtype: str) -> dict[str, Any]:
    """Runs `generate` and returns what it reports of memory, or why it refused."""
    guidance = "0" if ModelFile.open(case.path).config.unet.vector_dim else "7.5"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "gguf_sd", "generate", str(case.path), "-p", "a lighthouse", "--json"]
        command += ["--quiet", "--steps", str(case.steps), "--sampler", "euler", "--guidance", guidance, "--seed", "1"]
        command += ["--device", "cpu", "--dtype", dtype, "--max-memory", case.budget, "-o", f"{folder}/out.png"]
        command += ["--width", str(case.size), "--height", str(case.size)]
        command += ["--batch", str(case.batch), "--count", str(case.batch * batches), *case.options.split()]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 2:
        return {"refused": done.stderr.strip()}
    if done.returncode:
        raise SystemExit(f"{case.key}: {done.stderr[-2000:]}")
    told = json.loads(done.stdout)
    known = {"machine": f"{cpu_name()}, {os.cpu_count()} processors", "dtype": told["dtype"]}
    return known | row(told["memory"], told["seconds"], parse_memory(case.budget))


def row(memory: dict[str, Any], seconds: float, budget: int | None) -> dict[str, Any]:
    peak, measured = memory["peak"], memory["measured"]
    result = {
        "planned_mb": round(peak / 1e6),
        "measured_mb": round(measured / 1e6),
        "error": round(peak / measured - 1, 3),
        "seconds": seconds,
        "weights": memory["weights"],
        "placement": memory["placement"],
        "batch_guidance": memory["batch_guidance"],
        "vae_tile": memory["vae_tile"],
        "frugal": memory["frugal"],
    }
    if budget is not None:
        result |= {"budget_mb": round(budget / 1e6), "over_budget": round(measured / budget - 1, 3)}
    return result


def failed(result: dict[str, Any]) -> bool:
    if "refused" in result:
        return False
    return bool(abs(result["error"]) > ALLOWED_ERROR or result.get("over_budget", -1) > ALLOWED_OVER)


def shown(key: str, result: dict[str, Any]) -> str:
    if "refused" in result:
        return f"{key:40} {result['refused']}"
    placed = ", ".join(f"{name} {how}" for name, how in result["placement"].items())
    mark = "  <-- not kept" if failed(result) else ""
    return (
        f"{key:40} planned {result['planned_mb']:>6} MB, measured {result['measured_mb']:>6} MB, "
        f"{result['error']:+.1%}; {result['weights']}, {placed}, tile {result['vae_tile']}{mark}"
    )


def cases(args: argparse.Namespace) -> list[Case]:
    models = [model.split("=", 1) for model in args.models]
    return [
        Case(name, Path(path), size, batch, budget, args.steps, args.options)
        for (name, path), size, batch, budget in product(models, args.sizes, args.batches, args.budgets)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True, metavar="NAME=PATH", help="GGUF files")
    parser.add_argument("--sizes", nargs="+", type=int, default=[512], help="pixels along each side (512)")
    parser.add_argument("--batches", nargs="+", type=int, default=[1])
    parser.add_argument("--budgets", nargs="+", default=["auto"], help="as for --max-memory (auto: what is free)")
    parser.add_argument("--repeat", type=int, default=2, metavar="N", help="batches that are painted (2)")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--steps", type=int, default=1, help="of each batch (1)")
    parser.add_argument("--options", default="", help="more of generate's, such as --options=--medvram")
    parser.add_argument("--output", type=Path, default=RESULTS, help=f"JSON file to add to ({RESULTS.name})")
    args = parser.parse_args()
    known = json.loads(args.output.read_text()) if args.output.is_file() else {}
    results = known.get("results", {})
    bad = 0
    for case in cases(args):
        results[case.key] = result = measure(case, args.repeat, args.dtype)
        bad += failed(result)
        print(shown(case.key, result), flush=True)
        facts = {
            "date": date.today().isoformat(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "results": results,
        }
        args.output.write_text(json.dumps(facts, indent=2) + "\n")
    if bad:
        raise SystemExit(f"{bad} of {len(cases(args))} were not kept")


if __name__ == "__main__":
    main()
