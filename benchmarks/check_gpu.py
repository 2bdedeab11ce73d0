"""Every kernel on real shapes on this GPU against float64, and inline PTX against the portable code, bit for bit.

    python benchmarks/check_gpu.py --json check.json

``--device cpu`` runs small sizes in Triton's interpreter, to test this script.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

QTYPES = ("Q4_0", "Q4_1", "Q8_0")
LIMITS = {torch.float16: 2e-3, torch.bfloat16: 1e-2}
NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Sizes:
    """What to try: M, (N, K) of linears, (weight, picture, stride) of convolutions."""

    ms: tuple[int, ...]
    linears: tuple[tuple[int, int], ...]
    convs: tuple[tuple[tuple[int, int, int, int], tuple[int, int], int], ...]


REAL = Sizes(
    ms=(1, 17, 77, 256, 1000),
    linears=((320, 320), (1280, 2048), (1280, 5120), (5120, 640)),
    convs=(
        ((320, 320, 3, 3), (63, 65), 1),
        ((640, 960, 3, 3), (32, 31), 1),
        ((1280, 2560, 3, 3), (9, 8), 1),
        ((640, 640, 3, 3), (33, 35), 2),
        ((1280, 640, 1, 1), (17, 15), 2),
    ),
)
SMALL = Sizes(ms=(1, 17), linears=((64, 64),), convs=(((32, 64, 3, 3), (5, 4), 1), ((32, 64, 3, 3), (5, 4), 2)))


@dataclass(frozen=True)
class Result:
    """One comparison: ``error`` is relative, in the Euclidean norm."""

    name: str
    error: float
    limit: float

    @property
    def ok(self) -> bool:
        return self.error <= self.limit  # False for NaN


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=150, help="start nothing new after so long")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    torch.manual_seed(0)
    started = time.monotonic()
    results: list[Result] = []
    complete = True
    for result in checks(device, SMALL if device.type == "cpu" else REAL):
        results.append(result)
        if not result.ok:
            print(f"WRONG {result.name}: {result.error:.2e} > {result.limit:.0e}", flush=True)
        if complete := time.monotonic() - started < args.seconds:
            continue
        print("out of time: the rest was not checked")
        break
    wrong = sum(not r.ok for r in results)
    worst = max(results, key=lambda r: r.error / r.limit if r.limit else 0.0)
    print(f"{len(results)} comparisons in {time.monotonic() - started:.0f} s, {wrong} wrong; worst {worst}")
    if args.json:
        summary = {"complete": complete, "wrong": wrong, "results": [vars(r) for r in results]}
        args.json.write_text(json.dumps(summary, indent=1) + "\n")
    sys.exit(bool(wrong))


def checks(device: torch.device, sizes: Sizes) -> Iterator[Result]:
    """The cheap and fundamental first."""
    yield from dequantize_checks(device, sizes)
    yield from norm_checks(device, sizes)
    yield from ptx_checks(device, sizes)
    yield from linear_checks(device, sizes)
    yield from conv_checks(device, sizes)
    yield from int8_checks(device, sizes)
    yield from launch_checks(device, sizes)


def random_blocks(qtype: str, rows: int, cols: int, device: torch.device) -> Tensor:
    """Random codes under scales near those of real weights, uint8 [rows, row_bytes]."""
    from gguf_sd_kernels.formats import FORMATS

    fmt = FORMATS[qtype]
    blocks = torch.randint(0, 256, (rows * cols // 32, fmt.type_size), dtype=torch.uint8, device=device)
    halves = (fmt.scale_bytes + fmt.min_bytes) // 2
    scales = torch.randn(len(blocks), halves, device=device).mul(0.01).half()
    if fmt.min_bytes:
        scales[:, 1] -= 7.5 * scales[:, 0]  # the minimum, about half the range below zero
    blocks[:, : 2 * halves] = scales.view(torch.uint8)
    return blocks.view(rows, -1)


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def dequantize_checks(device: torch.device, sizes: Sizes) -> Iterator[Result]:
    """Against the plain-torch decoder on the CPU, which the tests hold against gguf-py: equal, not close."""
    from gguf_sd_kernels import reference
    from gguf_sd_kernels.dequantize import dequantize_packed
    from gguf_sd_kernels.repack import repack, unpack

    shape = sizes.convs[0][0]
    oc, ic, kh, kw = shape
    for qtype in QTYPES:
        blocks = random_blocks(qtype, oc, ic * kh * kw, device)
        lossless = torch.equal(unpack(repack(blocks, qtype)), blocks)
        yield Result(f"repack {qtype}", float(not lossless), 0.0)
        for dtype in LIMITS if device.type == "cuda" else (torch.float16,):
            for tap_major in (True, False):
                want = reference.conv_weight(blocks.cpu(), qtype, shape, dtype, tap_major=tap_major)
                got = dequantize_packed(repack(blocks, qtype, shape, tap_major=tap_major), dtype)
                name = f"dequantize {qtype} {NAMES[dtype]} {'tap' if tap_major else 'channel'}-major"
                yield Result(name, float(not torch.equal(got.cpu(), want)), 0.0)


def linear_checks(device: torch.device, sizes: Sizes) -> Iterator[Result]:
    from gguf_sd_kernels.linear import linear_fused

    for n, k in sizes.linears:
        for qtype in QTYPES:
            packed, weight = packed_weight(qtype, (n, k), device)
            for m in sizes.ms:
                for dtype, limit in LIMITS.items():
                    if dtype == torch.bfloat16 and m != 77:
                        continue
                    x, bias = (torch.randn(s, n_or_k, device=device, dtype=dtype) for s, n_or_k in ((m, k), (1, n)))
                    residual = torch.randn(m, n, device=device, dtype=dtype)
                    y = F.linear(x.double(), weight, bias[0].double())
                    name = f"linear {qtype} {NAMES[dtype]} {m}x{n}x{k}"
                    got = linear_fused(x, packed, bias[0], residual)
                    yield Result(name, error(got, y + residual), limit)
                    value, gate = y.chunk(2, dim=-1)
                    got = linear_fused(x, packed, bias[0], geglu=True)
                    yield Result(f"{name} geglu", error(got, value * F.gelu(gate)), limit)


def packed_weight(qtype: str, shape: tuple[int, ...], device: torch.device):  # type: ignore[no-untyped-def]
    """A random weight: packed, and decoded in float64 in ``shape``."""
    from gguf_sd_kernels import reference
    from gguf_sd_kernels.repack import repack

    cols = shape[1] * (shape[2] * shape[3] if len(shape) == 4 else 1)
    blocks = random_blocks(qtype, shape[0], cols, device)
    decoded = reference.dequantize(blocks.cpu(), qtype, torch.float32).to(device).double()
    if len(shape) == 4:
        oc, ic, kh, kw = shape
        decoded = decoded.view(oc, kh, kw, ic).permute(0, 3, 1, 2)
    return repack(blocks, qtype, shape, tap_major=len(shape) == 4), decoded


def conv_checks(device: torch.device, sizes: Sizes) -> Iterator[Result]:
    from gguf_sd_kernels.conv import conv2d_fused

    for shape, (height, width), stride in sizes.convs:
        for qtype in QTYPES:
            packed, weight = packed_weight(qtype, shape, device)
            for dtype, batch in ((torch.float16, 2), (torch.float16, 1), (torch.bfloat16, 1)):
                x = torch.randn(batch, shape[1], height, width, device=device, dtype=dtype)
                x = x.contiguous(memory_format=torch.channels_last)
                bias, emb = (torch.randn(b, shape[0], device=device, dtype=dtype) for b in (1, batch))
                want = conv_float64(x, weight, stride, shape[2] // 2)
                residual = torch.randn(want.shape, device=device, dtype=dtype)
                want = want + (bias + emb)[:, :, None, None].double() + residual
                got = conv2d_fused(x, packed, bias[0], stride, shape[2] // 2, residual=residual, emb=emb)
                name = f"conv {qtype} {NAMES[dtype]} {list(shape)} on {batch}x{height}x{width} stride {stride}"
                yield Result(name, error(got, want), LIMITS[dtype])


def conv_float64(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """By unfolding, a tap at a time: cuDNN's float64 convolutions may want more memory than there is."""
    batch, _, height, width = x.shape
    taps = weight.shape[2]
    padded = F.pad(x.double(), (padding,) * 4)
    oh, ow = ((size + 2 * padding - taps) // stride + 1 for size in (height, width))
    total = torch.zeros(batch, oh, ow, weight.shape[0], dtype=torch.float64, device=x.device)
    for i in range(taps):
        for j in range(taps):
            part = padded[:, :, i : i + stride * oh : stride, j : j + stride * ow : stride][:, :, :oh, :ow]
            total += part.permute(0, 2, 3, 1) @ weight[:, :, i, j].T
    return total.permute(0, 3, 1, 2)


def ptx_checks(device: torch.device, sizes: Sizes) -> Iterator[Result]:
    """Both decoders are exact, so the results are equal to the bit."""
    from gguf_sd_kernels.launch import UNTUNED, gpu_family
    from gguf_sd_kernels.linear import linear_fused

    n, k = sizes.linears[0]
    for qtype in QTYPES:
        packed, _ = packed_weight(qtype, (n, k), device)
        x = torch.randn(sizes.ms[-1], k, device=device, dtype=torch.float16)
        for _, launch in UNTUNED[gpu_family(device) or ""]:
            one, other = (linear_fused(x, packed, launch=replace(launch, ptx=ptx)) for ptx in (True, False))
            name = f"PTX against portable {qtype} {launch.block_m}x{launch.block_n}"
            yield Result(name, float(not torch.equal(one, other)), 0.0)


def launch_checks(device: torch.device, sizes: Sizes) -> Iterator[Result]:
    """Every launch of the table for this GPU, with K split and not; the same result again on each repetition."""
    from gguf_sd_kernels.conv import conv2d_fused
    from gguf_sd_kernels.launch import UNTUNED, gpu_family
    from gguf_sd_kernels.linear import linear_fused

    n, k = sizes.linears[-1]
    shape, (height, width), stride = sizes.convs[-1]
    for qtype in QTYPES:
        packed, weight = packed_weight(qtype, (n, k), device)
        packed_conv, conv_weight = packed_weight(qtype, shape, device)
        x = torch.randn(sizes.ms[-1], k, device=device, dtype=torch.float16)
        image = torch.randn(2, shape[1], height, width, device=device, dtype=torch.float16)
        want, conv_want = F.linear(x.double(), weight), conv_float64(image, conv_weight, stride, shape[2] // 2)
        for _, launch in UNTUNED[gpu_family(device) or ""]:
            for splits in (1, 5):
                chosen = replace(launch, splits=splits)
                tag = f"{qtype} {launch.block_m}x{launch.block_n} splits {splits}"
                first = linear_fused(x, packed, launch=chosen)
                yield Result(f"launch linear {tag}", error(first, want), 2e-3)
                again = all(torch.equal(linear_fused(x, packed, launch=chosen), first) for _ in range(5))
                yield Result(f"repeats itself {tag}", float(not again), 0.0)
                got = conv2d_fused(image, packed_conv, None, stride, shape[2] // 2, launch=chosen)
                yield Result(f"launch conv {tag}", error(got, conv_want), 2e-3)


def norm_checks(device: torch.device, sizes: Sizes) -> Iterator[Result]:
    from gguf_sd_kernels.triton_norm import group_norm_silu_triton, layer_norm_triton

    for shape, (height, width), _ in sizes.convs:
        channels = shape[1]
        for dtype, limit in LIMITS.items():
            x = torch.randn(2, channels, height, width, device=device, dtype=dtype) + 1
            weight, bias = torch.randn(2, channels, device=device, dtype=dtype)
            want = F.silu(F.group_norm(x.double(), 32, weight.double(), bias.double(), 1e-5))
            name = f"{NAMES[dtype]} {channels} channels {height}x{width}"
            yield Result(f"group norm {name}", error(group_norm_silu_triton(x, 32, weight, bias), want), limit)
            rows = x.permute(0, 2, 3, 1).contiguous()
            want = F.layer_norm(rows.double(), (channels,), weight.double(), bias.double(), 1e-5)
            yield Result(f"layer norm {name}", error(layer_norm_triton(rows, weight, bias), want), limit)


def int8_checks(device: torch.device, sizes: Sizes) -> Iterator[Result]:
    """Against float64 with the same quantised activations, and loosely with the true ones."""
    from gguf_sd_kernels.int8 import INT8_TYPES, linear_int8, quantize_activations

    n, k = sizes.linears[-1]
    for qtype in INT8_TYPES:
        packed, weight = packed_weight(qtype, (n, k), device)
        for m in sizes.ms:
            x = torch.randn(m, k, device=device, dtype=torch.float16)
            quantised = quantize_activations(x)
            values = (quantised.codes.view(m, -1, 32) * quantised.scales[..., None].double()).view(m, k)
            got = linear_int8(x, packed)
            yield Result(f"int8 {qtype} {m}x{n}x{k}", error(got, F.linear(values, weight)), 2e-3)
            yield Result(f"int8 {qtype} {m}x{n}x{k}, true x", error(got, F.linear(x.double(), weight)), 2e-2)


if __name__ == "__main__":
    main()
