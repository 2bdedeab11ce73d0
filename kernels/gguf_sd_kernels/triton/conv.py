"""Convolutions whose weight is decoded inside the product: implicit GEMM over channels-last activations.

M counts output pixels, N output channels, K = taps * IC in (KH, KW, IC) order, so a step of BLOCK_K stays inside
one tap and reads BLOCK_K neighbouring channels of each pixel.
"""

# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gguf_sd_kernels.checks import ConvSizes, conv_key, conv_sizes
from gguf_sd_kernels.devices import gpu_of
from gguf_sd_kernels.repack import PackedWeight
from gguf_sd_kernels.triton.launcher import PreparedLaunch, allocator, channels_last, in_order, with_rows
from gguf_sd_kernels.triton.tiles import (
    decode_tile,
    enlarged_at,
    finish_tile,
    first_row,
    multiply,
    split_range,
    tap_at,
    tile_position,
    weight_rows,
    windows,
)
from gguf_sd_kernels.triton.workspace import divide
from gguf_sd_kernels.tuning.launch import Launch, Prepared, choose


# One compilation serves every size of picture.
@triton.jit(do_not_specialize=["M", "H", "W", "OH", "OW", "stride", "padding", "steps"])
def conv_kernel(
    x,
    quants,
    scales,
    mins,
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
    steps,  # of BLOCK_K, a program
    QTYPE: tl.constexpr,
    TAPS_W: tl.constexpr,
    ENLARGE: tl.constexpr,
    SPLIT: tl.constexpr,
    SWAP: tl.constexpr,
    PTX: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """out [B * OH * OW, N] from x [B, H, W, IC] and w [N, taps, IC], with the epilogue of store_tile.

    Grid: (tiles, splits). ``emb`` is [B, N]. With ENLARGE x is [B, ceil(H / 2), ceil(W / 2), IC], each of its pixels
    seen as four.
    """
    tile_m, tile_n = tile_position(tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    rows_n = weight_rows(tile_n, N, BLOCK_N, False)
    top, left, pixel = windows(tile_m, M, H, W, OH, OW, stride, padding, BLOCK_M)
    corner = pixel * IC  # of each pixel's window
    if ENLARGE:
        above = first_row(tile_m, M, (H + 1) // 2, OH * OW, BLOCK_M)
    channels = tl.arange(0, BLOCK_K)
    DTYPE: tl.constexpr = x.dtype.element_ty
    start, stop = split_range(steps, K, BLOCK_K, SPLIT)
    acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.float32)
    for k in range(start, stop, BLOCK_K):
        shift, inside = tap_at(k, top, left, H, W, IC, TAPS_W)
        at = corner + (shift * IC + k)
        if ENLARGE:
            at = enlarged_at(k, above, top, left, (W + 1) // 2, IC, TAPS_W)
        values = tl.load(x + at[:, None] + channels[None, :], mask=inside[:, None], other=0.0)
        weights = decode_tile(quants, scales, mins, None, rows_n, k, K, QTYPE, DTYPE, PTX, BLOCK_K)
        acc = multiply(values, weights, acc, SWAP, WIDEN)
    if SWAP:
        acc = acc.T
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


class PreparedConv:
    """A convolution of ``sizes``, ready for operands of the dtypes it was prepared with; of pictures that are enlarged
    to those if ``enlarge``."""

    def __init__(self, sizes: ConvSizes, x: Tensor, launch: Launch | None, enlarge: bool = False):
        self.device = x.device
        self.result = allocator(sizes.result, x.dtype, x.device, torch.channels_last)
        self.start: PreparedLaunch | None = None
        if not sizes.batch:
            return
        launch = launch or choose(sizes.product, gpu_of(x.device))
        if sizes.ic % launch.block_k:
            raise ValueError(f"a step of {launch.block_k} channels does not divide {sizes.ic}")
        self.programs = divide(sizes.product, launch)
        self.start = PreparedLaunch(
            conv_kernel,
            self.programs.grid,
            x.device,
            (*sizes.numbers, self.programs.steps),
            {"QTYPE": sizes.product.qtype, "TAPS_W": sizes.kw, "ENLARGE": enlarge, "SPLIT": self.programs.split}
            | launch.decoding(x.device, x.dtype)
            | launch.tile,
            **launch.options,
        )

    def __call__(
        self, x: Tensor, weight: PackedWeight, bias: Tensor | None, residual: Tensor | None, emb: Tensor | None
    ) -> Tensor:
        out = self.result()
        if self.start is not None:
            arrays = channels_last(x), weight.quants, weight.scales, weight.mins
            self.start(*arrays, in_order(bias), channels_last(residual), emb, out, *self.programs.shared(self.device))
        return out


_prepared: Prepared[PreparedConv] = Prepared()


def conv2d_fused(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    *,
    residual: Tensor | None = None,
    emb: Tensor | None = None,
    enlarged: tuple[int, int] | None = None,
    launch: Launch | None = None,
) -> Tensor:
    """Convolves ``x [B, IC, H, W]`` with a tap-major weight of shape ``(OC, IC, KH, KW)`` -> ``[B, OC, OH, OW]``.

    With ``enlarged``, (H, W), x is enlarged to that size first, as torch's nearest-neighbour interpolation does it:
    twice x's, or one less. Adds ``bias [OC]``, ``emb [B, OC]`` (to every pixel of a picture) and ``residual``, of the
    result's shape. float16 and bfloat16, sums in float32; the result is channels-last, and so should x and residual
    be, or they are copied. Raises ValueError for a weight in (IC, KH, KW) order, which is to be dequantized, for
    channels that are no multiple of 32, other dtypes, and shapes that do not fit.
    """
    emb = with_rows(emb)
    key = conv_key((launch, enlarged), (stride, padding), x, weight, bias, residual, emb)
    run = _prepared.get(key)
    if run is None:
        sizes = conv_sizes(x, weight, bias, stride, padding, residual=residual, emb=emb, enlarged=enlarged)
        run = _prepared.keep(key, PreparedConv(sizes, x, launch, enlarged is not None))
    return run(x, weight, bias, residual, emb)
