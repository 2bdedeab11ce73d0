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

from .launch import Launch, Product, choose, gpu_family, multiprocessors
from .linear import DTYPES, MAX_ELEMENTS
from .repack import PackedWeight
from .triton_tiles import add_splits, decode_tile, multiply, store_tile, tile_position, weight_rows
from .workspace import split_workspace


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

    Grid: (tiles, splits). ``emb`` is [B, N].
    """
    tile_m, tile_n = tile_position(tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    rows_n = weight_rows(tile_n, N, BLOCK_N, False)
    pixel = tl.minimum(tile_m * BLOCK_M + tl.arange(0, BLOCK_M), M - 1)
    picture, within = pixel // (OH * OW), pixel % (OH * OW)
    top = within // OW * stride - padding
    left = within % OW * stride - padding
    corner = ((picture * H + top) * W + left) * IC  # of each pixel's window; may lie outside the picture
    channels = tl.arange(0, BLOCK_K)
    DTYPE: tl.constexpr = x.dtype.element_ty
    start, stop = 0, K
    if SPLIT:
        start = tl.program_id(1) * steps * BLOCK_K
        stop = tl.minimum(start + steps * BLOCK_K, K)
    acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.float32)
    for k in range(start, stop, BLOCK_K):
        tap = k // IC
        down, right = tap // TAPS_W, tap % TAPS_W
        # Unsigned: one comparison a side, as what lies above or left of the picture becomes huge.
        inside = ((top + down).to(tl.uint32) < H.to(tl.uint32)) & ((left + right).to(tl.uint32) < W.to(tl.uint32))
        offset = (down * W + right) * IC + k - tap * IC
        values = tl.load(x + (corner + offset)[:, None] + channels[None, :], mask=inside[:, None], other=0.0)
        weights = decode_tile(quants, scales, mins, rows_n, k, K, QTYPE, DTYPE, PTX, BLOCK_K)
        acc = multiply(values, weights, acc, SWAP, WIDEN)
    if SWAP:
        acc = acc.T
    if SPLIT:
        acc, last = add_splits(acc, partials, counters, BLOCK_M, BLOCK_N)
        if last:
            store_tile(acc, out, bias, residual, emb, tile_m, tile_n, M, N, OH * OW, BLOCK_M, BLOCK_N, False)
    else:
        store_tile(acc, out, bias, residual, emb, tile_m, tile_n, M, N, OH * OW, BLOCK_M, BLOCK_N, False)


def conv2d_fused(
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
    """Convolves ``x [B, IC, H, W]`` with a tap-major weight of shape ``(OC, IC, KH, KW)`` -> ``[B, OC, OH, OW]``.

    Adds ``bias [OC]``, ``emb [B, OC]`` (to every pixel of a picture) and ``residual``, of the result's shape.
    float16 and bfloat16, sums in float32; the result is channels-last, and so should x and residual be, or they
    are copied. Raises ValueError for a weight in (IC, KH, KW) order, which is to be dequantized, for channels
    that are no multiple of 32, other dtypes, and shapes that do not fit.
    """
    if x.dtype not in DTYPES:
        raise ValueError(f"fused products take float16 and bfloat16, got {x.dtype}")
    if len(weight.shape) != 4:
        raise ValueError(f"a convolution's weight is (OC, IC, KH, KW), got {list(weight.shape)}")
    n, ic, kh, kw = weight.shape
    if ic % 32 or not (weight.tap_major or kh == kw == 1):
        raise ValueError(f"weight {list(weight.shape)} is not tap-major with channels in 32s; dequantize it")
    if x.ndim != 4 or x.shape[1] != ic:
        raise ValueError(f"x {list(x.shape)} is not [B, {ic}, H, W], which a weight {list(weight.shape)} takes")
    batch, _, height, width = x.shape
    oh, ow = ((size + 2 * padding - taps) // stride + 1 for size, taps in ((height, kh), (width, kw)))
    if min(oh, ow) < 1:
        raise ValueError(f"a picture of {height} x {width} padded by {padding} is smaller than {kh} x {kw}")
    _check_epilogue(bias, emb, residual, (batch, n, oh, ow))
    m, k = batch * oh * ow, kh * kw * ic
    if max(x.numel() + (padding * width + padding) * ic, m * n) > MAX_ELEMENTS:
        raise ValueError(f"x {list(x.shape)} is too large for 32-bit offsets; split the batch or tile the picture")
    x = x.contiguous(memory_format=torch.channels_last)
    out = torch.empty(batch, n, oh, ow, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if launch is None:
        product = Product("conv", weight.qtype, m, n, k, taps=kh * kw)
        launch = choose(product, gpu_family(x.device), multiprocessors(x.device))
    if ic % launch.block_k:
        raise ValueError(f"a step of {launch.block_k} channels does not divide {ic}")
    tiles = triton.cdiv(m, launch.block_m) * triton.cdiv(n, launch.block_n)
    steps = triton.cdiv(k // launch.block_k, launch.splits)
    splits = triton.cdiv(k // launch.block_k, steps)  # none without work
    partials, counters = split_workspace(splits, tiles, launch.block_m * launch.block_n, x.device)
    conv_kernel[(tiles, splits)](
        x,
        weight.quants,
        weight.scales,
        weight.mins,
        bias,
        None if residual is None else residual.contiguous(memory_format=torch.channels_last),
        None if emb is None else emb.contiguous(),
        out,
        partials,
        counters,
        m,
        n,
        k,
        height,
        width,
        ic,
        oh,
        ow,
        stride,
        padding,
        steps,
        QTYPE=weight.qtype,
        TAPS_W=kw,
        SPLIT=splits > 1,
        **launch.constants(x),
        num_warps=launch.warps,
        num_stages=launch.stages,
    )
    return out


def _check_epilogue(
    bias: Tensor | None, emb: Tensor | None, residual: Tensor | None, result: tuple[int, int, int, int]
) -> None:
    batch, channels = result[:2]
    for name, tensor, shape in (
        ("bias", bias, (channels,)),
        ("emb", emb, (batch, channels)),
        ("residual", residual, result),
    ):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"the {name} of a result {list(result)} is {list(shape)}, got {list(tensor.shape)}")
