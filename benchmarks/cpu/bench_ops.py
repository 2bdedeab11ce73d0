"""What the CPU path gains over plain torch, at the shapes of one SD 1.5 step of 512x512 with guidance (batch 2); of
what is in 8 bits, what the kernels in C++ gain over torch's operators (one picture at a time, as there).

Both sides run alternately in one process; a time is the best of several, which on a shared machine is the one
least disturbed. ``python -m benchmarks.cpu.bench_ops [--dtype float32] [--threads 2] [--only "8 bits"] [--json FILE]``
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import date
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cpu.bench_step import FLAGS, cpu_name
from gguf_sd_kernels import ops
from gguf_sd_kernels.cpu import int8, native, processor
from gguf_sd_kernels.formats import block_format

UNET_WEIGHTS = 859_520_964  # of SD 1.5


@dataclass(frozen=True)
class Case:
    """Plain torch against ours; ``per_step`` is how often the call occurs in a step."""

    name: str
    plain: Callable[[], object]
    ours: Callable[[], object]
    per_step: float


@dataclass(frozen=True)
class Result:
    """Milliseconds a call, and what the difference is worth in a step."""

    name: str
    plain_ms: float
    ours_ms: float
    ratio: float
    saved_ms_a_step: float


def random_blocks(qtype: str, rows: int, cols: int) -> Tensor:
    """Blocks with scales of 1 and random codes."""
    fmt = block_format(qtype)
    blocks = torch.randint(0, 256, (rows, cols // fmt.block_size, fmt.type_size), dtype=torch.uint8)
    for field in range(0, fmt.scale_bytes + fmt.min_bytes, 2):
        blocks[..., field], blocks[..., field + 1] = 0x00, 0x3C
    return blocks.view(rows, -1)


def attention_cases(dtype: torch.dtype) -> Iterator[Case]:
    shapes = [(4096, 4096, 40, 5), (1024, 1024, 80, 5), (256, 256, 160, 5), (64, 64, 160, 1)]
    shapes += [(4096, 77, 40, 5), (1024, 77, 80, 5), (256, 77, 160, 5)]
    for n, m, d, count in shapes:
        q, k, v = (torch.randn(2, tokens, 8, d).to(dtype).transpose(1, 2) for tokens in (n, m, m))
        yield Case(
            f"attention [2, 8, {n}, {d}] on {m} keys",
            lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v),  # type: ignore[misc]
            lambda q=q, k=k, v=v: ops.attention(q, k, v),  # type: ignore[misc]
            count,
        )


def dequantize_cases(dtype: torch.dtype) -> Iterator[Case]:
    """Against the obvious formula; ``per_step`` scales to the whole UNet."""
    rows, cols = 1280, 11520
    out = torch.empty(rows, cols, dtype=dtype)
    for qtype in ("Q4_0", "Q4_1", "Q8_0"):
        blocks = random_blocks(qtype, rows, cols)
        yield Case(
            f"dequantize {qtype} [{rows}, {cols}]",
            lambda blocks=blocks, qtype=qtype: _dequantize_plain(blocks, qtype, dtype),  # type: ignore[misc]
            lambda blocks=blocks, qtype=qtype: ops.dequantize(blocks, qtype, dtype, out),  # type: ignore[misc]
            UNET_WEIGHTS / (rows * cols),
        )


def _dequantize_plain(blocks: Tensor, qtype: str, dtype: torch.dtype) -> Tensor:
    fmt = block_format(qtype)
    flat = blocks.view(-1, fmt.type_size)
    d, m, quants = flat.split([fmt.scale_bytes, fmt.min_bytes, fmt.quant_bytes], 1)
    codes = quants.view(torch.int8) if fmt.quant_bytes == 32 else torch.cat([quants & 15, quants >> 4], 1)
    values = (codes.float() - fmt.zero_point) * d.view(torch.float16).float()
    return (values + m.view(torch.float16).float() if fmt.min_bytes else values).to(dtype).view(len(blocks), -1)


def conv_cases(dtype: torch.dtype) -> Iterator[Case]:
    """Weights already decoded. Plain: stored (IC, KH, KW); ours: tap-major."""
    shapes = [(320, 320, 64, 1, 7), (640, 640, 32, 1, 6), (1280, 1280, 16, 1, 6), (1280, 1280, 8, 1, 11)]
    shapes += [(2560, 1280, 8, 1, 3), (2560, 1280, 16, 1, 2), (1920, 1280, 16, 1, 1), (1920, 640, 32, 1, 1)]
    shapes += [(960, 320, 64, 1, 1), (320, 320, 64, 2, 1), (1280, 1280, 16, 2, 1)]
    for ic, oc, size, stride, count in shapes:
        x = torch.randn(2, ic, size, size).to(dtype).to(memory_format=torch.channels_last)
        weight, bias = torch.randn(oc, ic, 3, 3).to(dtype), torch.randn(oc).to(dtype)
        ours = weight.to(memory_format=torch.channels_last)
        yield Case(
            f"conv 3x3 {ic} -> {oc} at {size}x{size}, stride {stride}",
            lambda x=x, w=weight, b=bias, s=stride: F.conv2d(x, w, b, s, 1),  # type: ignore[misc]
            lambda x=x, w=ours, b=bias, s=stride: ops.convolve(x, w, b, s, 1),  # type: ignore[misc]
            count,
        )


def linear_cases(dtype: torch.dtype) -> Iterator[Case]:
    for rows, width, count in [(8192, 320, 25), (2048, 640, 25), (512, 1280, 25)]:
        x, bias = torch.randn(rows, width).to(dtype), torch.randn(8 * width).to(dtype)
        weight = (0.05 * torch.randn(8 * width, width)).to(dtype)
        yield Case(
            f"linear [{rows}, {width}] -> {width}",
            lambda x=x, w=weight[:width], b=bias[:width]: F.linear(x, w, b),  # type: ignore[misc]
            lambda x=x, w=weight[:width], b=bias[:width]: ops.product(x, w, b),  # type: ignore[misc]
            count,
        )
        yield Case(
            f"geglu(linear) [{rows}, {width}] -> {4 * width}",
            lambda x=x, w=weight, b=bias: _geglu_plain(F.linear(x, w, b)),  # type: ignore[misc]
            lambda x=x, w=weight, b=bias: ops.product_geglu(x, w, b),  # type: ignore[misc]
            5,
        )


def _geglu_plain(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, -1)
    return value * F.gelu(gate)


def norm_cases(dtype: torch.dtype) -> Iterator[Case]:
    for channels, size, count in [(320, 64, 15), (640, 32, 15), (1280, 16, 15), (960, 64, 1)]:
        x = torch.randn(2, channels, size, size).to(dtype).to(memory_format=torch.channels_last)
        w, b = torch.randn(channels), torch.randn(channels)
        plain_w, plain_b = w.to(dtype), b.to(dtype)
        yield Case(
            f"group_norm_silu [2, {channels}, {size}, {size}]",
            lambda x=x, w=plain_w, b=plain_b: F.silu(F.group_norm(x, 32, w, b)),  # type: ignore[misc]
            lambda x=x, w=w, b=b: ops.group_norm_silu(x, 32, w, b),  # type: ignore[misc]
            count,
        )


def int8_cases(dtype: torch.dtype) -> Iterator[Case]:
    """Nothing in a dtype that has no kernels in C++."""
    if not native.quantizes(torch.zeros(16, dtype=dtype)):
        return
    for rows, width, count in [(4096, 320, 10), (1024, 640, 10), (256, 1280, 10)]:
        x = torch.randn(rows, width).to(dtype)
        weight, codes, bias = int8.Codes.of(torch.randn(8 * width, width)), int8.quantize(x), torch.randn(8 * width)
        norm = torch.randn(width), torch.randn(width), 1e-5
        edge = round(rows**0.5)
        image = x.view(1, edge, edge, width).permute(0, 3, 1, 2)
        yield _both(f"8 bits: quantise [{rows}, {width}]", lambda x=x: int8.quantize(x), 2.5 * count)  # type: ignore[misc]
        yield _both(
            f"8 bits: layer norm [{rows}, {width}]",
            lambda x=x, norm=norm: int8.quantize_layer_norm(x, *norm),  # type: ignore[misc]
            3 * count,
        )
        yield _both(
            f"8 bits: group norm, SiLU [{width}, {edge}, {edge}]",
            lambda x=image, norm=norm: int8.quantize_group_norm(x, 32, *norm, silu=True),  # type: ignore[misc]
            2 * count,
        )
        one, other = (int8.LinearWeight(int8.Codes(weight.values[:width], weight.scales[:width])) for _ in range(2))
        yield _both(
            f"8 bits: linear [{rows}, {width}] -> {width}",
            lambda x=codes, w=one, b=bias[:width], r=x: int8.linear(x, w, b, dtype, r),  # type: ignore[misc]
            5 * count,
            lambda x=codes, w=other, b=bias[:width], r=x: int8.linear(x, w, b, dtype, r),  # type: ignore[misc]
        )
        gated, halves = (int8.GatedWeight(weight, bias) for _ in range(2))
        yield _both(
            f"8 bits: geglu(linear) [{rows}, {width}] -> {4 * width}",
            lambda x=codes, w=gated: int8.linear_geglu(x, w, dtype),  # type: ignore[misc]
            count,
            lambda x=codes, w=halves: int8.linear_geglu(x, w, dtype),  # type: ignore[misc]
        )
        taps = int8.Codes.of(torch.randn(width, width, 3, 3))
        conv, plain = (int8.ConvWeight(taps, 1, 1) for _ in range(2))
        around, alone = int8.quantize(image, margin=True), int8.quantize(image)
        yield _both(
            f"8 bits: conv 3x3 {width} -> {width} at {edge}x{edge}",
            lambda x=around, w=conv, b=bias[:width]: int8.convolve(x, w, b, dtype),  # type: ignore[misc]
            1.4 * count,
            lambda x=alone, w=plain, b=bias[:width]: int8.convolve(x, w, b, dtype),  # type: ignore[misc]
        )


def _both(name: str, call: Callable[[], object], per_step: float, plain: Callable[[], object] | None = None) -> Case:
    """``call`` beside the same, or ``plain``, where torch's operators do it."""

    def through_torch() -> object:
        with patch.object(native, "is_there", lambda: False), patch.object(native, "multiplies", lambda *_: False):
            return (plain or call)()

    return Case(name, through_torch, call, per_step)


def measure(case: Case, repeats: int) -> Result:
    """Alternates the two sides, after one call each to warm up."""
    best = [float("inf"), float("inf")]
    for turn in range(repeats + 1):
        for side, call in enumerate((case.plain, case.ours)):
            start = time.perf_counter()
            call()
            if turn:
                best[side] = min(best[side], 1e3 * (time.perf_counter() - start))
    plain, ours = best
    return Result(case.name, plain, ours, ours / plain, (plain - ours) * case.per_step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["bfloat16", "float32", "float16"], default="bfloat16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", default="", help="run the cases whose name holds this")
    parser.add_argument("--json", metavar="FILE", help="write the results there too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    results = []
    print(f"{args.dtype}, {args.threads} threads\n{'':56}{'plain ms':>10}{'ours ms':>10}{'ratio':>8}{'saved/step':>12}")
    with torch.inference_mode():
        for cases in (attention_cases, dequantize_cases, conv_cases, linear_cases, norm_cases, int8_cases):
            for case in cases(dtype):
                if args.only not in case.name:
                    continue
                r = measure(case, args.repeats)
                results.append(r)
                print(
                    f"{r.name:56}{r.plain_ms:10.2f}{r.ours_ms:10.2f}{r.ratio:8.2f}{r.saved_ms_a_step:12.1f}", flush=True
                )
    if args.json:
        about = {
            "date": date.today().isoformat(),
            "machine": f"{cpu_name()}, {args.threads} threads",
            "features": [flag for flag in FLAGS if flag in (processor.flags() or ())],
            "torch": torch.__version__,
            "dtype": args.dtype,
        }
        with open(args.json, "w") as file:
            json.dump({**about, "results": [asdict(r) for r in results]}, file, indent=1)


if __name__ == "__main__":
    main()
