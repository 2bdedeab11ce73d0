"""Products with quantised weights, all sizes of SD 1.5 and SDXL: fused, dequantised first, and plain 16-bit.

    python -m benchmarks.gpu.bench_kernels --json kernels.json --auto auto.json --install

fused: decoded inside the product, with the fastest of the launches tried; dequantize: decoded by our kernel, then
cuBLAS or cuDNN; resident: cuBLAS or cuDNN on a 16-bit weight; int8: activations quantised too, each time, with the
fastest launch. All with bias, GEGLU included where the model has it.

Each figure is the median of several replays of a CUDA graph that calls the product on copies of the weight in turn,
enough of them that none is still in the L2 cache, as in a model. ``auto.json`` is what mode "auto" reads; ``--install``
puts it where it is looked for.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu.report import target_line
from benchmarks.lib.deadline import Deadline
from benchmarks.lib.device import device_name, prepare, synchronize
from benchmarks.lib.kernel_checks import error, launch_name
from benchmarks.lib.kernel_report import Row, line, step_totals, summary, table_head, targets
from benchmarks.lib.random_weights import random_blocks
from benchmarks.lib.shapes import WORKLOADS, Layer, step_layers, workloads
from gguf_sd_kernels.cache_folder import cache_folder
from gguf_sd_kernels.devices import gpu_family, multiprocessors
from gguf_sd_kernels.repack import PackedWeight, repack
from gguf_sd_kernels.tuning.launch import (
    Launch,
    Measured,
    Product,
    candidates,
    save_measured,
    table_name,
)
from gguf_sd_kernels.tuning.launch_int8 import int8_candidates, int8_supported

QTYPES = ("Q4_0", "Q8_0", "Q4_1")
CACHE_BYTES = 128 << 20  # more than the L2 cache of any GPU so far (RTX 5090: 96 MiB, H200: 60 MB)
MAX_COPIES, REPLAYS = 32, 5
Call = Callable[[], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cpu runs Triton's interpreter, to test this script")
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    parser.add_argument("--workload", action="append", help=f"of {', '.join(WORKLOADS)}; default: all")
    parser.add_argument("--qtype", action="append", choices=QTYPES, help="default: all")
    parser.add_argument("--only", default="", help="a part of the layer's name, as benchmarks/lib/shapes.py prints it")
    parser.add_argument("--seconds", type=float, default=240, help="start nothing new after so long")
    parser.add_argument("--json", type=Path, help="results")
    parser.add_argument("--auto", type=Path, help="launches and times for mode auto")
    parser.add_argument("--install", action="store_true", help="mode auto goes by what was measured, from now on")
    args = parser.parse_args()
    device, deadline = prepare(args.device), Deadline(args.seconds)
    works = {
        name: step_layers(work)
        for name, work in workloads(device).items()
        if not args.workload or name in args.workload
    }
    jobs = in_order_of_work(works, args.qtype or QTYPES, args.only)
    torch.backends.cudnn.benchmark = True  # the baselines at their best
    rows: list[Row] = []
    failures: dict[str, str] = {}
    print(table_head())
    try:
        for layer, qtype in jobs:
            if deadline.passed:
                break
            try:
                with torch.inference_mode():
                    rows.append(measure(layer, qtype, device, getattr(torch, args.dtype)))
            except Exception as problem:
                print(f"FAILED {qtype} {layer}\n{traceback.format_exc(limit=-4)}", flush=True)
                failures[f"{qtype} {layer}"] = f"{type(problem).__name__}: {problem}".splitlines()[0]
                synchronize(device)  # ends this where the GPU takes no more work
                continue
            print(line(rows[-1]), flush=True)
            if len(rows) % 20 == 0:
                write(args, rows, failures, works, jobs, device)
    finally:
        write(args, rows, failures, works, jobs, device)
    print("\n".join(summary(rows, failures, step_totals(works, rows), len(jobs))))
    print("\n".join(target_line(target) for target in targets(rows)))
    sys.exit(bool(failures) or not rows or any(row.wrong for row in rows))


def write(
    args: argparse.Namespace,
    rows: list[Row],
    failures: dict[str, str],
    works: dict[str, Counter[Layer]],
    jobs: list[tuple[Layer, str]],
    device: torch.device,
) -> None:
    """The results so far."""
    gpu, totals = device_name(device), step_totals(works, rows)
    if args.json:
        found = {
            "date": date.today().isoformat(),
            "gpu": gpu,
            "dtype": args.dtype,
            "complete": len(rows) == len(jobs),
            "failures": failures,
            "steps_ms": totals,
            "targets": targets(rows),
            "summary": summary(rows, failures, totals, len(jobs)),
            "products": [
                asdict(row) | {"tflops": round(row.tflops, 2), "gbytes": round(row.gbytes, 1)} for row in rows
            ],
        }
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    products = {row.product: Measured(row.launch, row.fused, row.dequantize, row.resident) for row in rows}
    installed = cache_folder() / "tables" / table_name(gpu)
    for path in (args.auto, installed if args.install else None):
        if path and products:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_measured(path, gpu, products)


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
    from gguf_sd_kernels.triton.conv import conv2d_fused
    from gguf_sd_kernels.triton.dequantize import dequantize_packed
    from gguf_sd_kernels.triton.int8 import conv2d_int8, linear_int8
    from gguf_sd_kernels.triton.linear import linear_fused

    ways = {"fused": (linear_fused, conv2d_fused), "int8": (linear_int8, conv2d_int8)}

    def ours(way: str, launch: Launch, weight: PackedWeight) -> Tensor:
        linear, conv2d = ways[way]
        if layer.op == "conv":
            return conv2d(x, weight, bias, layer.stride, layer.padding, launch=launch)
        return linear(x, weight, bias, geglu=layer.op == "geglu", launch=launch)

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
    want = library(full[0])
    dequantize = time_calls([partial(decoded, weight) for weight in weights])
    resident = time_calls([partial(library, weight) for weight in full])
    del full
    product = Product(layer.op, qtype, layer.m, layer.n, layer.k, layer.taps)
    family, processors = gpu_family(x.device) or "", multiprocessors(x.device)
    failed: dict[str, str] = {}
    launch, fused = fastest("fused", candidates(product, family, processors), ours, weights, failed)
    more: dict[str, Any] = {}
    if int8_supported(weights[0], x.device):
        tried = int8_candidates(product, family, processors)
        best, seconds = fastest("int8", tried, ours, weights, failed)
        of_int8 = error(ours("int8", best, weights[0]), want)
        more = {"int8": round(seconds * 1e6, 2), "int8_launch": best, "int8_error": round(of_int8, 6)}
    return Row(
        layer,
        qtype,
        launch,
        fused=round(fused * 1e6, 2),
        dequantize=round(dequantize * 1e6, 2),
        resident=round(resident * 1e6, 2),
        fused_error=round(error(ours("fused", launch, weights[0]), want), 6),
        failed_launches=failed,
        **more,
    )


def fastest(
    way: str,
    launches: Iterable[Launch],
    call: Callable[[str, Launch, PackedWeight], Tensor],
    weights: list[PackedWeight],
    failed: dict[str, str],
) -> tuple[Launch, float]:
    """(launch, seconds a call) of the best; notes in ``failed`` those that cannot be had, and why."""
    tried: dict[Launch, float] = {}
    for launch in launches:
        try:
            tried[launch] = time_calls([partial(call, way, launch, weight) for weight in weights])
        except Exception as problem:
            failed[f"{way} {launch_name(launch)}"] = f"{type(problem).__name__}: {problem}".splitlines()[0]
            synchronize(weights[0].device)  # raises where the GPU takes no more work
    if not tried:
        raise RuntimeError(f"no launch works: {failed}")
    return min(tried.items(), key=lambda item: item[1])


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


if __name__ == "__main__":
    main()
