"""Linear layers whose weight is decoded inside the product."""

# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, Product, choose, gpu_family, multiprocessors
from .repack import PackedWeight
from .triton_tiles import add_splits, decode_tile, multiply, store_tile, tile_position, weight_rows
from .workspace import split_workspace

DTYPES = (torch.float16, torch.bfloat16)
MAX_ELEMENTS = 2**31 - 1  # the kernels count in 32 bits


@triton.jit(do_not_specialize=["M", "steps"])  # one compilation serves every size
def linear_kernel(
    x,
    quants,
    scales,
    mins,
    bias,
    residual,
    out,
    partials,
    counters,
    M,
    N,
    K,
    steps,  # of BLOCK_K, a program
    QTYPE: tl.constexpr,
    GEGLU: tl.constexpr,
    SPLIT: tl.constexpr,
    SWAP: tl.constexpr,
    PTX: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """out [M, N] = x [M, K] . w [N, K]^T with the epilogue of store_tile. Grid: (tiles, splits)."""
    tile_m, tile_n = tile_position(tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    rows_m = tl.minimum(tile_m * BLOCK_M + tl.arange(0, BLOCK_M), M - 1)  # clamped: loads need no mask
    rows_n = weight_rows(tile_n, N, BLOCK_N, GEGLU)
    x_tile = x + rows_m[:, None] * K + tl.arange(0, BLOCK_K)[None, :]
    DTYPE: tl.constexpr = x.dtype.element_ty
    start, stop = 0, K
    if SPLIT:
        start = tl.program_id(1) * steps * BLOCK_K
        stop = tl.minimum(start + steps * BLOCK_K, K)
    acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.float32)
    for k in range(start, stop, BLOCK_K):
        values = tl.load(x_tile + k)
        weights = decode_tile(quants, scales, mins, rows_n, k, K, QTYPE, DTYPE, PTX, BLOCK_K)
        acc = multiply(values, weights, acc, SWAP, WIDEN)
    if SWAP:
        acc = acc.T
    if SPLIT:
        acc, last = add_splits(acc, partials, counters, BLOCK_M, BLOCK_N)
        if last:
            store_tile(acc, out, bias, residual, None, tile_m, tile_n, M, N, 1, BLOCK_M, BLOCK_N, GEGLU)
    else:
        store_tile(acc, out, bias, residual, None, tile_m, tile_n, M, N, 1, BLOCK_M, BLOCK_N, GEGLU)


def linear_fused(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    geglu: bool = False,
    launch: Launch | None = None,
) -> Tensor:
    """``x @ W.T + bias + residual``: ``x [..., K]``, W ``[N, K]``, ``bias [N]`` -> ``[..., N]`` in x's dtype.

    With ``geglu`` the N outputs are N/2 values and then N/2 gates, and ``value * gelu(gate)`` comes out,
    ``[..., N/2]``; there is no residual then. float16 and bfloat16; sums are float32.
    Raises ValueError for other dtypes, or shapes that do not fit.
    """
    n, k = weight.rows, weight.cols
    if x.dtype not in DTYPES:
        raise ValueError(f"fused products take float16 and bfloat16, got {x.dtype}")
    if x.ndim < 1 or x.shape[-1] != k:
        raise ValueError(f"x {list(x.shape)} does not end in the weight's {k} inputs")
    if geglu and (n % 2 or residual is not None):
        raise ValueError(f"GEGLU halves the outputs, of which there are {n}, and takes no residual")
    if bias is not None and tuple(bias.shape) != (n,):
        raise ValueError(f"the bias of {n} outputs is [{n}], got {list(bias.shape)}")
    rows = x.reshape(-1, k).contiguous()
    out = x.new_empty(*x.shape[:-1], n // 2 if geglu else n)
    if residual is not None and residual.shape != out.shape:
        raise ValueError(f"the residual of a result {list(out.shape)} has its shape, got {list(residual.shape)}")
    m = len(rows)
    if max(rows.numel(), m * n) > MAX_ELEMENTS:
        raise ValueError(f"{m} rows of {k} inputs and {n} outputs are too many for 32-bit offsets; split the batch")
    if not m:
        return out
    if launch is None:
        product = Product("geglu" if geglu else "linear", weight.qtype, m, n, k)
        launch = choose(product, gpu_family(x.device), multiprocessors(x.device))
    tiles = triton.cdiv(m, launch.block_m) * triton.cdiv(n, launch.block_n)
    steps = triton.cdiv(k // launch.block_k, launch.splits)
    splits = triton.cdiv(k // launch.block_k, steps)  # none without work
    partials, counters = split_workspace(splits, tiles, launch.block_m * launch.block_n, x.device)
    linear_kernel[(tiles, splits)](
        rows,
        weight.quants,
        weight.scales,
        weight.mins,
        bias,
        None if residual is None else residual.contiguous(),
        out,
        partials,
        counters,
        m,
        n,
        k,
        steps,
        QTYPE=weight.qtype,
        GEGLU=geglu,
        SPLIT=splits > 1,
        **launch.constants(x),
        num_warps=launch.warps,
        num_stages=launch.stages,
    )
    return out
