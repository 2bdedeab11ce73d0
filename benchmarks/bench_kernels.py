"""Products with quantised weights, all sizes of SD 1.5 and SDXL: fused, dequantised first, and plain 16-bit.

    python benchmarks/bench_kernels.py --json kernels.json --auto auto.json

fused: decoded inside the product, with the fastest of the launches tried; dequantize: decoded by our kernel, then
cuBLAS or cuDNN; resident: cuBLAS or cuDNN on a 16-bit weight. All with bias, GEGLU included where the model has it.

Each figure is the median of several replays of a CUDA graph that calls the product on copies of the weight in turn,
enough of them that none is still in the L2 cache, as in a model. ``auto.json`` is what mode "auto" reads.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from check_gpu import random_blocks
from shapes import WORKLOADS, Layer, step_layers
from torch import Tensor
from torch.nn import functional as F

from gguf_sd_kernels.launch import Launch, Measured, Product, candidates, gpu_family, multiprocessors, save_measured
from gguf_sd_kernels.repack import PackedWeight, repack

QTYPES = ("Q4_0", "Q8_0", "Q4_1")
CACHE_BYTES = 128 << 20  # more than the L2 cache of any GPU so far (RTX 5090: 96 MiB, H200: 50 MiB)
MAX_COPIES, REPLAYS = 32, 5
Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Row:
    """One product: microseconds a call in each mode, and the fused call's rates."""

    layer: Layer
    qtype: str
    launch: Launch
    fused: float
    dequantize: float
    resident: float
    int8: float | None = None  # activations in 8 bits too: linears, Q4_0 and Q8_0

    @property
    def tflops(self) -> float:
        """Of the fused call, 10^12 floating-point operations a second."""
        return 2 * self.layer.gmac / self.fused / 1e-3

    @property
    def gbytes(self) -> float:
        """Weights, activations and results moved once by the fused call, 10^9 bytes a second."""
        bits = {"Q4_0": 4.5, "Q4_1": 5.0, "Q8_0": 8.5}[self.qtype]
        activations = self.layer.m * self.layer.k / self.layer.taps * self.layer.stride**2
        columns = self.layer.n / (2 if self.layer.op == "geglu" else 1)
        moved = self.layer.n * self.layer.k * bits / 8 + 2 * (activations + self.layer.m * columns)
        return moved / self.fused / 1e3

    @property
    def product(self) -> Product:
        return Product(self.layer.op, self.qtype, self.layer.m, self.layer.n, self.layer.k, self.layer.taps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cpu runs Triton's interpreter, to test this script")
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    parser.add_argument("--workload", action="append", choices=list(WORKLOADS), help="default: all")
    parser.add_argument("--qtype", action="append", choices=QTYPES, help="default: all")
    parser.add_argument("--only", default="", help="a part of the layer's name, as benchmarks/shapes.py prints it")
    parser.add_argument("--seconds", type=float, default=240, help="start nothing new after so long")
    parser.add_argument("--json", type=Path, help="results")
    parser.add_argument("--auto", type=Path, help="launches and times for mode auto")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    works = {name: step_layers(WORKLOADS[name]) for name in args.workload or WORKLOADS}
    jobs = in_order_of_work(works, args.qtype or QTYPES, args.only)
    torch.backends.cudnn.benchmark = True  # the rivals at their best
    started = time.monotonic()
    rows: list[Row] = []
    header = f"{'':6}{'':44}{'fused':>9}{'dequant':>9}{'16 bit':>9}{'int8':>9} us{'TFLOP/s':>9}{'GB/s':>7}  launch"
    print(header)
    with torch.inference_mode():
        for layer, qtype in jobs:
            if time.monotonic() - started > args.seconds:
                break
            row = measure(layer, qtype, device, getattr(torch, args.dtype))
            rows.append(row)
            print(line(row), flush=True)
    totals = summarise(works, rows)
    print(table(totals), f"\n{len(rows)} of {len(jobs)} products measured")
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "Triton interpreter: times mean nothing"
    if args.json:
        result = {
            "date": date.today().isoformat(),
            "gpu": gpu,
            "versions": {"torch": torch.__version__, "triton": __import__("triton").__version__},
            "dtype": args.dtype,
            "complete": len(rows) == len(jobs),
            "steps_ms": totals,
            "products": [
                asdict(row) | {"tflops": round(row.tflops, 2), "gbytes": round(row.gbytes, 1)} for row in rows
            ],
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    if args.auto:
        products = {row.product: Measured(row.launch, row.fused, row.dequantize, row.resident) for row in rows}
        save_measured(args.auto, gpu, products)


def in_order_of_work(works: dict[str, Counter[Layer]], qtypes: tuple[str, ...], only: str) -> list[tuple[Layer, str]]:
    """Every (layer, type) once, those that steps spend most arithmetic on first."""
    work: Counter[Layer] = Counter()
    for layers in works.values():
        total = sum(layer.gmac * count for layer, count in layers.items())
        for layer, count in layers.items():
            work[layer] += layer.gmac * count / total  # type: ignore[assignment]
    ordered = [layer for layer, _ in work.most_common() if only in str(layer)]
    return [(layer, qtype) for qtype in qtypes for layer in ordered]


def measure(layer: Layer, qtype: str, device: torch.device, dtype: torch.dtype) -> Row:
    copies = max(1, min(MAX_COPIES, CACHE_BYTES // (layer.n * layer.k // 2))) if device.type == "cuda" else 1
    shape: tuple[int, ...] = (layer.n, layer.k)
    if layer.op == "conv":
        side = {1: 1, 9: 3}[layer.taps]
        shape = (layer.n, layer.k // layer.taps, side, side)
    weights = [
        repack(random_blocks(qtype, layer.n, layer.k, device), qtype, shape, tap_major=True) for _ in range(copies)
    ]
    x = torch.randn(*(layer.picture or (layer.m, layer.k)), device=device, dtype=dtype)
    if layer.picture:
        x = x.contiguous(memory_format=torch.channels_last)
    bias = torch.randn(layer.n, device=device, dtype=dtype)
    return time_modes(layer, qtype, x, bias, weights)


def time_modes(layer: Layer, qtype: str, x: Tensor, bias: Tensor, weights: list[PackedWeight]) -> Row:
    from gguf_sd_kernels.conv import conv2d_fused
    from gguf_sd_kernels.dequantize import dequantize_packed
    from gguf_sd_kernels.int8 import INT8_TYPES, linear_int8
    from gguf_sd_kernels.linear import linear_fused

    def fused(weight: PackedWeight, launch: Launch) -> Tensor:
        if layer.op == "conv":
            return conv2d_fused(x, weight, bias, layer.stride, layer.padding, launch=launch)
        return linear_fused(x, weight, bias, geglu=layer.op == "geglu", launch=launch)

    def library(weight: Tensor) -> Tensor:
        if layer.op == "conv":
            return F.conv2d(x, weight, bias, layer.stride, layer.padding)
        y = F.linear(x, weight, bias)
        if layer.op == "linear":
            return y
        value, gate = y.chunk(2, dim=-1)
        return value * F.gelu(gate)

    def decoded(weight: PackedWeight) -> Tensor:
        return library(dequantize_packed(weight, x.dtype, scratch))

    scratch = torch.empty(layer.n * layer.k, dtype=x.dtype, device=x.device)
    full = [dequantize_packed(weight, x.dtype) for weight in weights]
    seconds: dict[str, float] = {
        "dequantize": time_calls([partial(decoded, weight) for weight in weights]),
        "resident": time_calls([partial(library, weight) for weight in full]),
    }
    del full
    tried: dict[Launch, float] = {}
    product = Product(layer.op, qtype, layer.m, layer.n, layer.k, layer.taps)
    for launch in candidates(product, gpu_family(x.device) or "", multiprocessors(x.device)):
        tried[launch] = time_calls([partial(fused, weight, launch) for weight in weights])
    if layer.op != "conv" and qtype in INT8_TYPES:
        int8 = partial(linear_int8, x, bias=bias, geglu=layer.op == "geglu")
        seconds["int8"] = time_calls([partial(int8, weight) for weight in weights])
    best = min(tried, key=lambda launch: tried[launch])
    micro = {name: round(value * 1e6, 2) for name, value in (seconds | {"fused": tried[best]}).items()}
    return Row(layer, qtype, best, **micro)


def time_calls(calls: list[Call]) -> float:
    """Median seconds a call, all calls in a CUDA graph; on a CPU, of one run of each."""
    if not torch.cuda.is_available():
        started = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - started) / len(calls)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()  # compiles, and lets the libraries choose their algorithm
        calls[0]()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(times) / len(calls)


def summarise(works: dict[str, Counter[Layer]], rows: list[Row]) -> dict[str, Any]:
    """Milliseconds of all products of a step in each mode, by workload and type, where all were measured."""
    totals: dict[str, Any] = {}
    by_product = {(row.layer, row.qtype): row for row in rows}
    for name, layers in works.items():
        for qtype in dict.fromkeys(row.qtype for row in rows):
            found = [(by_product.get((layer, qtype)), count) for layer, count in layers.items()]
            if any(row is None for row, _ in found):
                continue
            sums = {
                mode: round(sum(getattr(row, mode) * count for row, count in found) / 1e3, 3)
                for mode in ("fused", "dequantize", "resident")
            }
            best = sum(min(row.fused, row.dequantize) * count for row, count in found if row) / 1e3
            totals[f"{name} {qtype}"] = sums | {"auto": round(best, 3)}
    return totals


def line(row: Row) -> str:
    launch = row.launch
    times = "".join(f"{t:9.1f}" for t in (row.fused, row.dequantize, row.resident, row.int8 or float("nan")))
    tile = f"{launch.block_m}x{launch.block_n}x{launch.block_k} {launch.warps}w {launch.stages}s x{launch.splits}"
    return f"{row.qtype:6}{row.layer!s:44}{times}   {row.tflops:9.1f}{row.gbytes:7.0f}  {tile}"


def table(totals: dict[str, Any]) -> str:
    lines = [f"\nproducts of a step, ms{'':8}{'fused':>9}{'dequant':>9}{'16 bit':>9}{'auto':>9}"]
    for name, sums in totals.items():
        lines.append(f"{name:30}" + "".join(f"{sums[m]:9.3f}" for m in ("fused", "dequantize", "resident", "auto")))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
