"""Linear layers whose weight is decoded inside the product."""

# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gguf_sd_kernels.checks import linear_key, linear_product, linear_shape
from gguf_sd_kernels.devices import gpu_of
from gguf_sd_kernels.repack import PackedWeight
from gguf_sd_kernels.row_parts import MAX_PARTS, FoldedNorm, RowParts
from gguf_sd_kernels.triton.launcher import PreparedLaunch, allocator, in_order
from gguf_sd_kernels.triton.row_norm import apply_row_norm, row_norm
from gguf_sd_kernels.triton.tiles import decode_tile, finish_tile, multiply, split_range, tile_position, weight_rows
from gguf_sd_kernels.triton.workspace import divide
from gguf_sd_kernels.tuning.launch import Launch, Prepared, choose


@triton.jit(do_not_specialize=["M", "steps", "part_width", "eps"])  # one compilation serves every size
def linear_kernel(
    x,
    quants,
    scales,
    mins,
    gain,
    sums,
    parts,
    bias,
    residual,
    out,
    out_parts,
    partials,
    counters,
    M,
    N,
    K,
    steps,  # of BLOCK_K, a program
    part_width,
    eps,
    QTYPE: tl.constexpr,
    GEGLU: tl.constexpr,
    PARTS: tl.constexpr,
    SPLIT: tl.constexpr,
    SWAP: tl.constexpr,
    PTX: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """out [M, N] = x [M, K] . w [N, K]^T with the epilogue of store_tile. Grid: (tiles, splits).

    With ``gain``, ``sums`` and ``parts`` x is normalised by rows first, see row_norm; ``out_parts`` takes those of out.
    """
    tile_m, tile_n = tile_position(tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    rows_m = tl.minimum(tile_m * BLOCK_M + tl.arange(0, BLOCK_M), M - 1)  # clamped: loads need no mask
    rows_n = weight_rows(tile_n, N, BLOCK_N, GEGLU)
    x_tile = x + rows_m[:, None] * K + tl.arange(0, BLOCK_K)[None, :]
    DTYPE: tl.constexpr = x.dtype.element_ty
    if parts is not None:
        mean, scale = row_norm(parts, part_width, rows_m, M, K, eps, PARTS)
    start, stop = split_range(steps, K, BLOCK_K, SPLIT)
    acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.float32)
    for k in range(start, stop, BLOCK_K):
        values = tl.load(x_tile + k)
        weights = decode_tile(quants, scales, mins, gain, rows_n, k, K, QTYPE, DTYPE, PTX, BLOCK_K)
        acc = multiply(values, weights, acc, SWAP, WIDEN)
    if SWAP:
        acc = acc.T
    if parts is not None:
        acc = apply_row_norm(acc, mean, scale, sums, rows_n, SPLIT)
    finish_tile(
        acc,
        out,
        bias,
        residual,
        None,
        0,
        out_parts,
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


class PreparedLinear:
    """A linear layer, ready for operands of the shapes and dtypes of those it was prepared with; ``launch`` is the
    chosen one by default.

    ``normed`` are parts of x's rows and the eps they are normalised with: then it is for :meth:`normed` alone. Raises
    ValueError as :func:`linear_fused` does.
    """

    def __init__(
        self,
        x: Tensor,
        weight: PackedWeight,
        bias: Tensor | None,
        residual: Tensor | None,
        geglu: bool,
        launch: Launch | None = None,
        normed: tuple[RowParts, float] | None = None,
    ):
        self.device = x.device
        self.result = allocator(linear_shape(x, weight, bias, residual, geglu), x.dtype, x.device)
        self.start: PreparedLaunch | None = None
        product = linear_product(x, weight, geglu)
        if not product.m:
            return
        launch = launch or choose(product, gpu_of(x.device))
        if normed is not None:
            normed[0].check(product.m, product.k)
        self.part_width = launch.block_n // (2 if launch.block_m * launch.block_n > 16384 else 1)
        self.parts = allocator((2, -(-product.n // self.part_width), product.m), torch.float32, x.device)
        self.programs = divide(product, launch)
        part_width, eps = (normed[0].width, normed[1]) if normed else (0, 0.0)
        self.start = PreparedLaunch(
            linear_kernel,
            self.programs.grid,
            x.device,
            (product.m, product.n, product.k, self.programs.steps, part_width, eps),
            {"QTYPE": product.qtype, "GEGLU": geglu, "PARTS": MAX_PARTS, "SPLIT": self.programs.split}
            | launch.decoding(x.device, x.dtype)
            | launch.tile,
            **launch.options,
        )

    def __call__(self, x: Tensor, weight: PackedWeight, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        return self._run(x, weight, bias, residual, _NO_NORM, None)

    def normed(self, x: Tensor, weight: PackedWeight, parts: RowParts, norm: FoldedNorm) -> Tensor:
        """The product of normalised rows."""
        return self._run(x, weight, norm.bias, None, (norm.gain, norm.sums, parts.values), None)

    def measured(
        self, x: Tensor, weight: PackedWeight, bias: Tensor | None, residual: Tensor | None
    ) -> tuple[Tensor, RowParts | None]:
        """The product, and the parts of its rows; None where it has none."""
        if self.start is None:
            return self(x, weight, bias, residual), None
        parts = self.parts()
        return self._run(x, weight, bias, residual, _NO_NORM, parts), RowParts(parts, self.part_width)

    def _run(
        self,
        x: Tensor,
        weight: PackedWeight,
        bias: Tensor | None,
        residual: Tensor | None,
        norm: tuple[Tensor | None, Tensor | None, Tensor | None],
        parts: Tensor | None,
    ) -> Tensor:
        out = self.result()
        if self.start is not None:
            arrays = in_order(x), weight.quants, weight.scales, weight.mins, *norm
            self.start(*arrays, in_order(bias), in_order(residual), out, parts, *self.programs.shared(self.device))
        return out


_NO_NORM = None, None, None
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


def linear_measured(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    launch: Launch | None = None,
) -> tuple[Tensor, RowParts | None]:
    """As :func:`linear_fused`, and what a norm of the result's rows takes; None where there are no rows."""
    key = linear_key((launch, "measured"), False, x, weight, bias, residual)
    run = _prepared.get(key) or _prepared.keep(key, PreparedLinear(x, weight, bias, residual, False, launch))
    return run.measured(x, weight, bias, residual)


def linear_normed(
    x: Tensor,
    parts: RowParts,
    weight: PackedWeight,
    norm: FoldedNorm,
    *,
    geglu: bool = False,
    launch: Launch | None = None,
) -> Tensor:
    """As :func:`linear_fused` of ``x [..., K]`` normalised by rows, of which ``parts`` tell; ``norm`` has the bias too.

    Raises ValueError for parts that are not of x's rows, or too many, as well.
    """
    key = linear_key((launch, parts.width, norm.eps), geglu, x, weight, norm.bias, None)
    run = _prepared.get(key)
    if run is None:
        run = _prepared.keep(key, PreparedLinear(x, weight, norm.bias, None, geglu, launch, normed=(parts, norm.eps)))
    return run.normed(x, weight, parts, norm)
