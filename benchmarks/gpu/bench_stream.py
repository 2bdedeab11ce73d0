"""UNet steps whose weights come over the bus, beside steps with resident ones: is the copying hidden by the computing?

    python -m benchmarks.gpu.bench_stream --json stream.json

A file with a UNet of random Q4_0 weights is written for each workload. Steps run on the fused kernels (on a CPU in
plain torch), those of each kind one after the other; medians. The floor of a streamed step is the larger of the
resident step and of its bytes over the rate of one large copy from pinned memory. ``overlap`` is the share of the
smaller of the two that was hidden behind the larger: 1 where a step takes no longer than that floor, 0 where it takes
as long as both. Streamed results have to equal resident ones to the bit.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.lib.deadline import Deadline
from benchmarks.lib.device import REPEATS, call_seconds, device_name
from benchmarks.lib.random_weights import unet_inputs
from benchmarks.lib.shapes import Workload, workloads
from benchmarks.lib.unet_file import write_unet
from gguf_sd.checkpoint.model_file import ModelFile
from gguf_sd.runtime.parts import LoadedAs, Parts
from gguf_sd.runtime.streaming import StreamedUNet

QTYPE = "Q4_0"
ROUNDS = 7  # steps of each kind, after one that is not counted
PLACEMENTS = ("resident", "streamed")


def bus_rate(device: torch.device) -> float:
    """Bytes a second of a large copy from pinned memory to the device; on a CPU of one in memory."""
    nbytes = 256 << 20 if device.type == "cuda" else 1 << 20
    source = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.empty_like(source, device=device)
    seconds = min(call_seconds(lambda: target.copy_(source, non_blocking=True), device) for _ in range(REPEATS))
    return nbytes / seconds


def overlap(streamed: float, resident: float, copies: float) -> float:
    """The share of the shorter of computing and copying that the longer one hid; times in one unit."""
    hidden = resident + copies - streamed
    return max(0.0, min(1.0, hidden / min(resident, copies)))


def measured(model: ModelFile, work: Workload, device: torch.device, rate: float) -> dict[str, Any]:
    """One workload's entry of the results."""
    dtype, kernels = (torch.float16, "fused") if device.type == "cuda" else (torch.float32, "torch")
    inputs = unet_inputs(work.config.unet, work.batch, work.size // work.config.vae.downscale, dtype, device)
    latents, timesteps, context, *vector = inputs
    seconds: dict[str, list[float]] = {placement: [] for placement in PLACEMENTS}
    results: dict[str, Tensor] = {}
    memory: dict[str, int] = {}
    step_bytes = 0
    parts = {placement: Parts(model, device) for placement in PLACEMENTS}
    with torch.inference_mode():
        for placement in PLACEMENTS:
            how = LoadedAs(dtype, "quantized", kernels, placement)
            with parts[placement].unet(how) as unet:
                memory[placement] = parts[placement].nbytes
                projected = unet.project(context)

                def step(unet: Any = unet, projected: Tensor = projected) -> Tensor:
                    return unet.step(latents, timesteps, projected, *vector)

                results[placement] = step()
                seconds[placement] = [call_seconds(step, device) for _ in range(ROUNDS)]
                if isinstance(unet, StreamedUNet):
                    step_bytes = unet.meter.step_bytes
    resident, streamed = (statistics.median(seconds[placement]) for placement in PLACEMENTS)
    copies = step_bytes / rate
    return {
        "resident_ms": 1e3 * resident,
        "streamed_ms": 1e3 * streamed,
        "copies_ms": 1e3 * copies,
        "step_bytes": step_bytes,
        "gbytes_per_second": step_bytes / streamed / 1e9,
        "overlap": overlap(streamed, resident, copies),
        "bytes": memory,
        "equal": bool(torch.equal(*results.values())),
    }


def row(name: str, entry: dict[str, Any]) -> str:
    return (
        f"{name:18} resident {entry['resident_ms']:8.1f} ms, streamed {entry['streamed_ms']:8.1f} ms, copies alone "
        f"{entry['copies_ms']:7.1f} ms: overlap {entry['overlap']:.2f}, {entry['gbytes_per_second']:.2f} GB/s; weights "
        f"{entry['bytes']['resident'] / 1e6:.0f} -> {entry['bytes']['streamed'] / 1e6:.0f} MB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=120, help="after which no workload is begun")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device, deadline = torch.device(args.device), Deadline(args.seconds)
    rate, streams, left_out = bus_rate(device), dict[str, Any](), list[str]()
    for name, work in workloads(device).items():
        if deadline.passed:
            left_out.append(name)
            continue
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "unet.gguf"
            write_unet(path, work.config, QTYPE, device)
            streams[f"{name} {QTYPE}"] = measured(ModelFile.open(path), work, device, rate)
    summary = [f"{device_name(device)}, {rate / 1e9:.1f} GB/s from pinned memory"]
    summary += [row(name, entry) for name, entry in streams.items()]
    summary += [f"left out: {', '.join(left_out)}"] if left_out else []
    print("\n".join(summary))
    if args.json:
        found = {"streams": streams, "bus_gbytes": rate / 1e9, "summary": summary, "targets": []}
        args.json.write_text(json.dumps(found, indent=2) + "\n")
    if unequal := [name for name, entry in streams.items() if not entry["equal"]]:
        raise SystemExit(f"streamed results differ from resident ones: {', '.join(unequal)}")


if __name__ == "__main__":
    main()
