"""Linears and convolutions with both operands in 8 bits: activations are quantised per 32 too, products are exact.

GeForce cards multiply int8 at several times their rate for float16 with float32 sums. It costs accuracy: with
activations in 8 bits a result is off by 0.4 % of its norm on Gaussian ones, 0.5 % with GEGLU. So it is a choice, not
the default, and no good for layers whose inputs have outliers: keys and values of cross-attention, the first and the
last convolution.

Activations are quantised by a launch of their own, once, and not by each tile of N anew.
"""

# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gguf_sd_kernels.checks import ConvSizes, conv_key, conv_sizes, linear_key, linear_product, linear_shape
from gguf_sd_kernels.devices import gpu_of
from gguf_sd_kernels.repack import PackedWeight
from gguf_sd_kernels.triton.launcher import PreparedLaunch, allocator, channels_last, in_order, with_rows
from gguf_sd_kernels.triton.quantize import quantize_activations
from gguf_sd_kernels.triton.tiles import finish_tile, split_range, tap_at, tile_position, weight_rows, windows
from gguf_sd_kernels.triton.workspace import divide
from gguf_sd_kernels.tuning.launch import Launch, Prepared, Product
from gguf_sd_kernels.tuning.launch_int8 import INT8_TYPES, choose_int8


@triton.jit
def _weight_codes(quants, rows, k, K, QTYPE: tl.constexpr):
    """int8 [R, 32]: Q8_0's values, or Q4_0's nibbles, 8 too large."""
    if QTYPE == "Q8_0":
        packed = tl.load(quants + rows[:, None] * K + k + tl.arange(0, 32)[None, :])
        codes = (packed ^ 0x80).to(tl.int8, bitcast=True)
    else:
        packed = tl.load(quants + rows[:, None] * (K // 2) + k // 2 + tl.arange(0, 16)[None, :])
        pairs = tl.join(packed & 0x0F, packed >> 4)
        codes = tl.permute(pairs, (0, 2, 1)).reshape(rows.shape[0], 32).to(tl.int8, bitcast=True)
    return codes


@triton.jit
def _add_block(acc, codes, x_scales, sums, quants, scales, rows_n, k, K, QTYPE: tl.constexpr):
    """acc [M, N] + the products of a block: x's codes [M, 32], scales [M] and sums [M] with w's values from k on.

    The int32 sums of a block start at 0x4B400000, the bits of 1.5 * 2^23: read as float32 they are that number plus
    the sum, which is at most 32 * 127 * 128 and so stays within the mantissa. This saves a conversion a value.
    """
    weights = _weight_codes(quants, rows_n, k, K, QTYPE)
    products = tl.dot(codes, weights.T, tl.full(acc.shape, 0x4B400000, tl.int32), out_dtype=tl.int32)
    zeros = tl.full(x_scales.shape, 0x4B400000, tl.int32)  # what a sum of 0 is read as
    if QTYPE == "Q4_0":
        zeros += 8 * sums  # the zero point of nibbles
    w_scales = tl.load(scales + rows_n * (K // 32) + k // 32).to(tl.float32)
    exact = products.to(tl.float32, bitcast=True) - zeros.to(tl.float32, bitcast=True)[:, None]
    return acc + exact * (x_scales[:, None] * w_scales[None, :])


@triton.jit(do_not_specialize=["M", "steps"])
def linear_int8_kernel(
    codes,
    x_scales,
    sums,
    quants,
    scales,
    bias,
    residual,
    out,
    partials,
    counters,
    M,
    N,
    K,
    steps,  # of 32, a program
    QTYPE: tl.constexpr,
    GEGLU: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """out [M, N] = x [M, K] . w [N, K]^T with the epilogue of store_tile. Grid: (tiles, splits)."""
    tile_m, tile_n = tile_position(tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    rows_m = tl.minimum(tile_m * BLOCK_M + tl.arange(0, BLOCK_M), M - 1)
    rows_n = weight_rows(tile_n, N, BLOCK_N, GEGLU)
    x_tile = codes + rows_m[:, None] * K + tl.arange(0, 32)[None, :]
    start, stop = split_range(steps, K, 32, SPLIT)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(start, stop, 32):
        block = rows_m * (K // 32) + k // 32
        x_scale, x_sum = tl.load(x_scales + block), tl.load(sums + block)
        acc = _add_block(acc, tl.load(x_tile + k), x_scale, x_sum, quants, scales, rows_n, k, K, QTYPE)
    finish_tile(
        acc,
        out,
        bias,
        residual,
        None,
        0,
        None,
        partials,
        counters,
        tile_m,
        tile_n,
        M,
        N,
        1,
        BLOCK_M,
        BLOCK_N,
        GEGLU,
        SPLIT,
    )


@triton.jit(do_not_specialize=["M", "H", "W", "OH", "OW", "stride", "padding", "steps"])
def conv_int8_kernel(
    codes,
    x_scales,
    sums,
    quants,
    scales,
    bias,
    residual,
    emb,
    out,
    partials,
    counters,
    emb_stride,
    M,
    N,
    K,
    H,
    W,
    IC,
    OH,
    OW,
    stride,
    padding,
    steps,  # of 32, a program
    QTYPE: tl.constexpr,
    TAPS_W: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """As conv.conv_kernel, x [B, H, W, IC] in blocks of 32 channels. What lies outside the picture is a block of 0."""
    tile_m, tile_n = tile_position(tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    rows_n = weight_rows(tile_n, N, BLOCK_N, False)
    top, left, pixel = windows(tile_m, M, H, W, OH, OW, stride, padding, BLOCK_M)
    within = tl.arange(0, 32)[None, :]
    start, stop = split_range(steps, K, 32, SPLIT)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(start, stop, 32):
        shift, inside = tap_at(k, top, left, H, W, IC, TAPS_W)
        block = (pixel + shift) * (IC // 32) + k // 32
        x_codes = tl.load(codes + block[:, None] * 32 + within, mask=inside[:, None], other=0)
        x_scale = tl.load(x_scales + block, mask=inside, other=0.0)
        x_sum = tl.load(sums + block, mask=inside, other=0)
        acc = _add_block(acc, x_codes, x_scale, x_sum, quants, scales, rows_n, k, K, QTYPE)
    finish_tile(
        acc,
        out,
        bias,
        residual,
        emb,
        emb_stride,
        None,
        partials,
        counters,
        tile_m,
        tile_n,
        M,
        N,
        OH * OW,
        BLOCK_M,
        BLOCK_N,
        False,
        SPLIT,
    )


class PreparedInt8:
    """A product in 8 bits, ready for operands of the dtypes it was prepared with; of a linear layer, or of a
    convolution where there are ``sizes``."""

    def __init__(
        self,
        result: tuple[int, ...],
        product: Product,
        x: Tensor,
        launch: Launch | None,
        sizes: ConvSizes | None = None,
    ):
        launch = _checked(launch, product, x.device)
        self.device, self.pictures = x.device, sizes is not None
        layout = torch.channels_last if sizes else torch.contiguous_format
        self.result = allocator(result, x.dtype, x.device, layout)
        self.start: PreparedLaunch | None = None
        if not product.m:
            return
        self.programs = divide(product, launch)
        constants = {"QTYPE": product.qtype, "SPLIT": self.programs.split} | launch.tile
        numbers: tuple[int, ...]
        if sizes:
            kernel, numbers, constants["TAPS_W"] = conv_int8_kernel, sizes.numbers, sizes.kw
        else:
            kernel, numbers = linear_int8_kernel, (product.m, product.n, product.k)
            constants["GEGLU"] = product.op == "geglu"
        numbers = (*numbers, self.programs.steps)
        self.start = PreparedLaunch(kernel, self.programs.grid, x.device, numbers, constants, **launch.options)

    def __call__(
        self, x: Tensor, weight: PackedWeight, bias: Tensor | None, residual: Tensor | None, emb: Tensor | None = None
    ) -> Tensor:
        out = self.result()
        if self.start is None:
            return out
        epilogue: tuple[Tensor | None, ...]
        if self.pictures:
            rows = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
            epilogue = in_order(bias), channels_last(residual), emb
        else:
            rows, epilogue = x.reshape(-1, weight.cols), (in_order(bias), in_order(residual))
        codes = quantize_activations(rows)
        arrays = codes.codes, codes.scales, codes.sums, weight.quants, weight.scales
        self.start(*arrays, *epilogue, out, *self.programs.shared(self.device))
        return out

    @classmethod
    def linear(
        cls,
        x: Tensor,
        weight: PackedWeight,
        bias: Tensor | None,
        residual: Tensor | None,
        geglu: bool,
        launch: Launch | None,
    ) -> PreparedInt8:
        """The linear layer of such operands."""
        return cls(linear_shape(x, weight, bias, residual, geglu), linear_product(x, weight, geglu), x, launch)

    @classmethod
    def conv(cls, sizes: ConvSizes, x: Tensor, launch: Launch | None) -> PreparedInt8:
        """The convolution of ``sizes``."""
        return cls(sizes.result, sizes.product, x, launch, sizes)


_prepared: Prepared[PreparedInt8] = Prepared()


def linear_int8(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    geglu: bool = False,
    launch: Launch | None = None,
) -> Tensor:
    """As :func:`gguf_sd_kernels.triton.linear.linear_fused`, x quantised to 8 bits: Q4_0 and Q8_0 weights only.

    Raises ValueError for other types, dtypes other than float16 and bfloat16, GPUs without 8-bit launches, or shapes
    that do not fit.
    """
    key = linear_key(launch, geglu, x, weight, bias, residual)
    run = _prepared.get(key) or _prepared.keep(key, PreparedInt8.linear(x, weight, bias, residual, geglu, launch))
    return run(x, weight, bias, residual)


def conv2d_int8(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    *,
    residual: Tensor | None = None,
    emb: Tensor | None = None,
    launch: Launch | None = None,
) -> Tensor:
    """As :func:`gguf_sd_kernels.triton.conv.conv2d_fused`, x quantised to 8 bits, per 32 channels of a pixel: Q4_0 and
    Q8_0 weights only.

    Raises ValueError for other types, weights in (IC, KH, KW) order, channels that are no multiple of 32, dtypes
    other than float16 and bfloat16, GPUs without 8-bit launches, or shapes that do not fit.
    """
    emb = with_rows(emb)
    key = conv_key(launch, (stride, padding), x, weight, bias, residual, emb)
    run = _prepared.get(key)
    if run is None:
        sizes = conv_sizes(x, weight, bias, stride, padding, residual=residual, emb=emb)
        run = _prepared.keep(key, PreparedInt8.conv(sizes, x, launch))
    return run(x, weight, bias, residual, emb)


def _checked(launch: Launch | None, product: Product, device: torch.device) -> Launch:
    """``launch``, or the chosen one; ValueError where 8-bit products cannot be made so."""
    if product.qtype not in INT8_TYPES:
        raise ValueError(f"products in 8 bits take {' and '.join(INT8_TYPES)} weights, got {product.qtype}")
    launch = launch or choose_int8(product, gpu_of(device))
    if launch.block_k != 32:
        raise ValueError(f"a step of products in 8 bits is a block of 32, got {launch.block_k}")
    return launch
