"""Linear layers whose weight is decoded inside the product."""

# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gguf_sd_kernels.checks import linear_key, linear_product, linear_shape
from gguf_sd_kernels.devices import gpu_of
from gguf_sd_kernels.repack import PackedWeight
from gguf_sd_kernels.triton.launcher import PreparedLaunch, allocator, in_order
from gguf_sd_kernels.triton.tiles import decode_tile, finish_tile, multiply, split_range, tile_position, weight_rows
from gguf_sd_kernels.triton.workspace import divide
from gguf_sd_kernels.tuning.launch import Launch, Prepared, choose


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
    start, stop = split_range(steps, K, BLOCK_K, SPLIT)
    acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.float32)
    for k in range(start, stop, BLOCK_K):
        values = tl.load(x_tile + k)
        weights = decode_tile(quants, scales, mins, rows_n, k, K, QTYPE, DTYPE, PTX, BLOCK_K)
        acc = multiply(values, weights, acc, SWAP, WIDEN)
    if SWAP:
        acc = acc.T
    finish_tile(
        acc, out, bias, residual, None, 0, partials, counters, tile_m, tile_n, M, N, 1, BLOCK_M, BLOCK_N, GEGLU, SPLIT
    )


class PreparedLinear:
    """A linear layer, ready for operands of the shapes and dtypes of those it was prepared with; ``launch`` is the
    chosen one by default.

    Raises ValueError as :func:`linear_fused` does.
    """

    def __init__(
        self,
        x: Tensor,
        weight: PackedWeight,
        bias: Tensor | None,
        residual: Tensor | None,
        geglu: bool,
        launch: Launch | None = None,
    ):
        self.device = x.device
        self.result = allocator(linear_shape(x, weight, bias, residual, geglu), x.dtype, x.device)
        self.start: PreparedLaunch | None = None
        product = linear_product(x, weight, geglu)
        if not product.m:
            return
        launch = launch or choose(product, gpu_of(x.device))
        self.programs = divide(product, launch)
        self.start = PreparedLaunch(
            linear_kernel,
            self.programs.grid,
            x.device,
            (product.m, product.n, product.k, self.programs.steps),
            {"QTYPE": product.qtype, "GEGLU": geglu, "SPLIT": self.programs.split}
            | launch.decoding(x.device, x.dtype)
            | launch.tile,
            **launch.options,
        )

    def __call__(self, x: Tensor, weight: PackedWeight, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        out = self.result()
        if self.start is not None:
            arrays = in_order(x), weight.quants, weight.scales, weight.mins
            self.start(*arrays, in_order(bias), in_order(residual), out, *self.programs.shared(self.device))
        return out


_prepared: Prepared[PreparedLinear] = Prepared()


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
    key = linear_key(launch, geglu, x, weight, bias, residual)
    run = _prepared.get(key) or _prepared.keep(key, PreparedLinear(x, weight, bias, residual, geglu, launch))
    return run(x, weight, bias, residual)
