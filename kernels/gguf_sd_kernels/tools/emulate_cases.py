"""What is executed in the emulator: every kernel with every launch of a family's tables, on small shapes with ragged
edges, each with what should come out in float64."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from gguf_sd_kernels.formats import block_format
from gguf_sd_kernels.reference.products import conv_weight, dequantize
from gguf_sd_kernels.repack import PACKED_TYPES, PackedWeight, repack
from gguf_sd_kernels.row_parts import RowParts
from gguf_sd_kernels.tuning.launch import UNTUNED, Launch, Product
from gguf_sd_kernels.tuning.launch_int8 import INT8_TYPES, UNTUNED_INT8
from gguf_sd_kernels.tuning.operands import Operands, Use

NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
HALVES = (torch.float16, torch.bfloat16)
# Relative errors in the Euclidean norm. Products in bfloat16 see weights that were rounded to it, as their oracle does.
LIMIT, INT8_LIMIT = 2e-3, 1e-2
Outcome = tuple[Tensor, Tensor]  # what came out, and what should have


@dataclass(frozen=True)
class Case:
    """One launch: ``run`` makes its operands, from a seed that the name gives, and launches."""

    kernel: str
    launch: str
    shape: str
    limit: float
    run: Callable[[], Outcome]
    is_picture: bool = False  # values from 0 to 1, whose error is the root of the mean square

    @property
    def name(self) -> str:
        return f"{self.kernel} {self.launch} {self.shape}"

    def seed(self) -> int:
        return zlib.crc32(self.name.encode())

    def error(self, got: Tensor, want: Tensor) -> float:
        """Relative in the Euclidean norm. Raises ValueError for another shape than the wanted one."""
        if got.shape != want.shape:
            raise ValueError(f"the result is {list(got.shape)}, not {list(want.shape)}")
        scale = math.sqrt(want.numel()) if self.is_picture else want.norm()
        return float((got.double() - want).norm() / scale)


def cases(family: str) -> Iterator[Case]:
    """Every case for ``family``, a key of launch.UNTUNED."""
    for launch, qtype, dtype in product(_launches(family), PACKED_TYPES, HALVES):
        yield from _products(launch, qtype, dtype, int8=False)
    for launch, qtype, dtype in product([launch for _, launch in UNTUNED_INT8[family]], INT8_TYPES, HALVES):
        yield from _products(launch, qtype, dtype, int8=True)
    yield from _dequantize_cases()
    yield from _norm_cases()
    yield from _quantize_cases()


def _launches(family: str) -> list[Launch]:
    """The family's, and those with the narrower step that is taken where channels are no multiple of 64."""
    table = [launch for _, launch in UNTUNED[family]]
    return list(dict.fromkeys(table + [replace(launch, block_k=32) for launch in table]))


def _products(launch: Launch, qtype: str, dtype: torch.dtype, *, int8: bool) -> Iterator[Case]:
    """Linear, GEGLU and convolutions, each with K whole and split."""
    for splits in (1, 2):
        cut = replace(launch, splits=splits)
        words = f"{qtype} {NAMES[dtype]} {_words(cut)}"
        limit, prefix = (INT8_LIMIT, "int8 ") if int8 else (LIMIT, "")
        m, n = launch.block_m * 3 // 2 + 5, launch.block_n * 3 // 2  # a whole tile and a part of one each way
        k = 4 * launch.block_k + 32 * (launch.block_k == 32)
        for op, rows in (("linear", n), ("geglu", 2 * n)):
            multiply = partial(run_linear, m, rows, k, qtype, dtype, cut, geglu=op == "geglu", int8=int8)
            yield Case(f"{prefix}{op}", words, f"{m}x{rows}x{k}", limit, multiply)
        for side in (1, 3):
            channels = launch.block_k * (3 if side == 1 else 1)
            picture = 2, channels, 9, math.ceil(launch.block_m / 12)
            convolve = partial(run_conv, picture, (n, channels, side, side), qtype, dtype, cut, int8=int8)
            yield Case(f"{prefix}conv {side}x{side}", words, f"{_sizes(picture)} to {n}", limit, convolve)
        if not int8:
            for name, use in _around(qtype, m, n, k, launch.block_k).items():
                yield Case(name, words, str(use.product.m), limit, partial(run_use, use, dtype, cut))


def _around(qtype: str, m: int, n: int, k: int, channels: int) -> dict[str, Use]:
    """Products that take in what comes before them, or leave what comes after them something."""
    picture = 2, channels, 9, math.ceil(m / 18)
    conv = Product("conv", qtype, math.prod(picture) // channels, n, 9 * channels, 9)
    return {
        "linear normed": Use(Product("linear", qtype, m, n, k), ("bias", "norm")),
        "geglu normed": Use(Product("geglu", qtype, m, 2 * n, k), ("bias", "norm")),
        "linear measured": Use(Product("linear", qtype, m, n, k), ("bias", "residual", "parts")),
        "conv enlarged": Use(conv, ("bias", "enlarge"), picture, padding=1),
    }


def run_use(use: Use, dtype: torch.dtype, launch: Launch) -> Outcome:
    """The result, and behind it the statistics that it leaves, if any."""
    operands = Operands(use, dtype, torch.device("cpu"))
    got, want = operands.call(launch), operands.plain().double()
    if operands.left is None:
        return got, want
    parts = RowParts.of(got, operands.left.width).values
    return torch.cat([got.float().flatten(), operands.left.values.flatten()]), torch.cat(
        [want.flatten(), parts.flatten()]
    )


def _words(launch: Launch) -> str:
    words = f"{launch.block_m}x{launch.block_n}x{launch.block_k} {launch.warps}w {launch.stages}s"
    return words + (" split" if launch.splits > 1 else "")


def run_linear(
    m: int, n: int, k: int, qtype: str, dtype: torch.dtype, launch: Launch, *, geglu: bool, int8: bool
) -> Outcome:
    """x [m, k] times a weight [n, k], with everything that can be added."""
    from gguf_sd_kernels.triton.int8 import linear_int8
    from gguf_sd_kernels.triton.linear import linear_fused

    blocks = random_blocks(qtype, n, k)
    x, bias = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype)
    residual = None if geglu else torch.randn(m, n).to(dtype)
    multiply = linear_int8 if int8 else linear_fused
    got = multiply(x, repack(blocks, qtype), bias, residual, geglu=geglu, launch=launch)
    want = F.linear(x.double(), _seen(dequantize(blocks, qtype), dtype), bias.double())
    if geglu:
        value, gate = want.chunk(2, dim=-1)
        want = value * F.gelu(gate)
    return got, want if residual is None else want + residual.double()


def run_conv(
    picture: tuple[int, ...], shape: tuple[int, ...], qtype: str, dtype: torch.dtype, launch: Launch, *, int8: bool
) -> Outcome:
    """Pictures [B, IC, H, W] convolved with a weight of ``shape`` (OC, IC, KH, KW), same size, with everything that can
    be added."""
    from gguf_sd_kernels.triton.conv import conv2d_fused
    from gguf_sd_kernels.triton.int8 import conv2d_int8

    out, _, side, _ = shape
    weight = random_weight(qtype, shape, tap_major=True)
    x, bias = torch.randn(picture).to(dtype), torch.randn(out).to(dtype)
    emb, residual = torch.randn(picture[0], out).to(dtype), torch.randn(picture[0], out, *picture[2:]).to(dtype)
    convolve = conv2d_int8 if int8 else conv2d_fused
    got = convolve(x, weight.packed, bias, 1, side // 2, residual=residual, emb=emb, launch=launch)
    want = F.conv2d(x.double(), _seen(weight.values, dtype), bias.double(), padding=side // 2)
    return got, want + emb.double()[:, :, None, None] + residual.double()


@dataclass(frozen=True)
class RandomWeight:
    """A weight as kernels take it, and its values in float32."""

    packed: PackedWeight
    values: Tensor


def random_weight(qtype: str, shape: tuple[int, ...], *, tap_major: bool) -> RandomWeight:
    """A convolution's weight, (OC, IC, KH, KW)."""
    blocks = random_blocks(qtype, shape[0], math.prod(shape[1:]))
    out, channels, height, width = shape
    values = conv_weight(blocks, qtype, (out, channels, height, width), torch.float32, tap_major=tap_major)
    return RandomWeight(repack(blocks, qtype, shape, tap_major=tap_major), values)


def random_blocks(qtype: str, rows: int, cols: int) -> Tensor:
    """uint8 ``[rows, row_bytes]``: any codes, scales and minima of a size that keeps products near 1."""
    fmt = block_format(qtype)
    count = rows * cols // 32
    parts = []
    for size, largest in ((fmt.scale_bytes, 0.6 / 2**7 if qtype == "Q8_0" else 0.05), (fmt.min_bytes, -0.3)):
        if size:
            parts.append((torch.rand(count, 1) * largest).to(torch.float16).view(torch.uint8))
    parts.append(torch.randint(256, (count, fmt.quant_bytes), dtype=torch.uint8))
    return torch.cat(parts, 1).view(rows, -1)


def _seen(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in float64, as a product in ``dtype`` sees it."""
    return (weight.to(dtype) if dtype == torch.bfloat16 else weight).double()


def _dequantize_cases() -> Iterator[Case]:
    from gguf_sd_kernels.triton.dequantize import BLOCKS, WARPS, dequantize_packed

    for qtype, dtype, shape in product(PACKED_TYPES, NAMES, ((37, 96), (5, 64, 3, 3))):

        def run(qtype: str = qtype, dtype: torch.dtype = dtype, shape: tuple[int, ...] = shape) -> Outcome:
            """Rounded once: bit for bit what plain torch rounds to."""
            if len(shape) == 4:
                weight = random_weight(qtype, shape, tap_major=False)
                return dequantize_packed(weight.packed, dtype), weight.values.to(dtype).double()
            blocks = random_blocks(qtype, *shape)
            return dequantize_packed(repack(blocks, qtype), dtype), dequantize(blocks, qtype).to(dtype).double()

        limit = (
            1e-7 if dtype == torch.float32 and qtype == "Q4_1" else 0.0
        )  # a fused multiply-add rounds once, not twice
        yield Case("dequantize", f"{qtype} {NAMES[dtype]} {BLOCKS} blocks {WARPS}w", _sizes(shape), limit, run)


def _norm_cases() -> Iterator[Case]:
    from gguf_sd_kernels.triton.norm import group_norm_silu_triton, layer_norm_triton

    shapes, flags = ((64, 7), (320, 9)), (False, True)
    for dtype, (channels, side), silu, whole in product(NAMES, shapes, flags, flags):

        def group(
            dtype: torch.dtype = dtype,
            shape: tuple[int, ...] = (2, channels, side, side),
            silu: bool = silu,
            whole: bool = whole,
        ) -> Outcome:
            x, weight, bias = _normed(shape, shape[1], dtype)
            got = group_norm_silu_triton(x, 32, weight, bias, 1e-5, silu, whole)
            want = F.group_norm(x.double(), 32, weight.double(), bias.double(), 1e-5)
            return got, F.silu(want) if silu else want

        name = f"{'whole ' if whole else ''}group norm{' silu' if silu else ''}"
        yield Case(name, NAMES[dtype], _sizes((2, channels, side, side)), LIMIT, group)
    for dtype, width in product(NAMES, (320, 1280)):

        def layer(dtype: torch.dtype = dtype, shape: tuple[int, ...] = (5, width)) -> Outcome:
            x, weight, bias = _normed(shape, shape[1], dtype)
            want = F.layer_norm(x.double(), shape[1:], weight.double(), bias.double())
            return layer_norm_triton(x, weight, bias), want

        yield Case("layer norm", NAMES[dtype], _sizes((5, width)), LIMIT, layer)


def _normed(shape: tuple[int, ...], channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Activations with a mean far from 0, and parameters."""
    x = torch.randn(shape) * 2 + 3
    return x.to(dtype), torch.randn(channels).to(dtype), torch.randn(channels).to(dtype)


def _quantize_cases() -> Iterator[Case]:
    from gguf_sd_kernels.triton.quantize import QUANTIZE_BLOCKS, QUANTIZE_WARPS, quantize_activations

    for dtype in HALVES:

        def run(dtype: torch.dtype = dtype) -> Outcome:
            """Codes are whole numbers, sums are theirs, and nothing is off by more than half a step."""
            x = torch.randn(37, 160).to(dtype)
            got = quantize_activations(x)
            blocks = x.double().view(37, 5, 32)
            scales = blocks.abs().amax(2) / 127
            codes = got.codes.view(37, 5, 32).double()
            sums_differ = (got.sums.double() - codes.sum(2)).abs().max()
            off = ((codes - blocks / scales[..., None]).abs() - 0.5).clamp(min=0).max()
            scales_differ = ((got.scales.double() - scales) / scales).abs().max()
            return 1 + torch.stack([sums_differ, off, scales_differ]), torch.ones(3, dtype=torch.float64)

        yield Case("quantize", f"{NAMES[dtype]} {QUANTIZE_BLOCKS} blocks {QUANTIZE_WARPS}w", "37x160", 1e-4, run)


def _sizes(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
