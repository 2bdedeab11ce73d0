"""What a LoRA costs a guided UNet step on this CPU: the same quantised UNet without one, with one on the layers that
most LoRAs have (attention, feed-forward, projections), and with one on all layers, in turns.

    python -m benchmarks.cpu.bench_lora --rank 32 --type Q4_0 --size 512 --output benchmarks/results/cpu-lora.json

The UNet is SD 1.5's at its full size, its weights and the LoRA's are random. Figures are medians; seconds of processor
time stand beside those on the clock, for machines that have other work.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterable
from datetime import date
from pathlib import Path

import torch

from benchmarks.cpu.bench_step import cpu_name
from benchmarks.lib.unet_file import write_unet
from gguf_sd.adapters.factors import Factors, LowRank
from gguf_sd.adapters.side_path import attach, detach
from gguf_sd.adapters.targets import UNET_PART, Target, targets
from gguf_sd.checkpoint.model_file import ModelFile
from gguf_sd.config import SD15
from gguf_sd.runtime.memory import choose_dtype

USUAL = (".transformer_blocks.", ".proj_in", ".proj_out")
TURNS = ("without", "usual layers", "all layers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--type", default="Q4_0")
    parser.add_argument("--size", type=int, default=512, help="pixels along each side")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtype = choose_dtype(args.dtype, torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        write_unet(Path(folder) / "unet.gguf", SD15, args.type, torch.device("cpu"))
        seconds = measured(Path(folder) / "unet.gguf", args.rank, args.size, dtype, args.repeats)
    result = {
        "date": date.today().isoformat(),
        "machine": f"{cpu_name()}, {args.threads} threads",
        "versions": {"torch": torch.__version__},
        "model": f"SD 1.5, {args.type}, random weights",
        "rank": args.rank,
        "size": args.size,
        "dtype": str(dtype).removeprefix("torch."),
        "seconds": {name: round(wall, 3) for name, (wall, _) in seconds.items()},
        "processor_seconds": {name: round(own, 3) for name, (_, own) in seconds.items()},
        "processor_ratio": {name: round(own / seconds["without"][1], 3) for name, (_, own) in seconds.items()},
    }
    print(json.dumps(result, indent=2))
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")


def factors(chosen: Iterable[Target], rank: int) -> list[tuple[Target, Factors]]:
    """Random ones."""
    made: list[tuple[Target, Factors]] = []
    for target in chosen:
        out, channels, *kernel = target.shape
        down = torch.randn(rank, channels, *kernel) * 0.01
        made.append((target, LowRank(down, torch.randn(out, rank) * 0.01)))
    return made


@torch.inference_mode()
def measured(path: Path, rank: int, size: int, dtype: torch.dtype, repeats: int) -> dict[str, tuple[float, float]]:
    """Median seconds of a step on the clock and of the processor, after one round to warm up."""
    model = ModelFile.open(path)
    unet, layers = model.load_unet(dtype), dict.fromkeys(targets(model.config).values())
    own = [target for target in layers if target.part == UNET_PART]
    chosen = {TURNS[1]: [t for t in own if any(part in t.module for part in USUAL)], TURNS[2]: own}
    changes = {TURNS[0]: [], **{name: factors(some, rank) for name, some in chosen.items()}}
    latents, timesteps = torch.randn(2, 4, size // 8, size // 8).to(dtype), torch.full((2,), 500)
    projected = unet.project(torch.randn(2, 77, model.config.unet.context_dim).to(dtype))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in changes}
    for turn in range(repeats + 1):
        for name, change in changes.items():
            attach(unet, change, dtype, torch.device("cpu"))
            started, worked = time.perf_counter(), time.process_time()
            unet.step(latents, timesteps, projected)
            if turn:
                times[name].append((time.perf_counter() - started, time.process_time() - worked))
            detach(unet)
    return {
        name: (statistics.median(w for w, _ in pairs), statistics.median(c for _, c in pairs))
        for name, pairs in times.items()
    }


if __name__ == "__main__":
    main()
