"""Layer normalisation within the products: one leaves the statistics of its result's rows, the next takes them in.

With mean m and deviation s of a row x, gain g and shift b, LN(x) . w is (x . (g w) - m sum(g w)) / s + b . w. So the
product reads x as it is: the gain goes into the weights as they are decoded, ``sum(g w)`` and ``b . w`` are prepared
once, and m and s come from the parts of rows that the tiles of the product before have left. Those hold a mean and
a sum of squared deviations, and are joined as in Chan, Golub and LeVeque 1983: nothing is lost where a mean is large.
"""

# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def store_row_parts(parts, values, first, m, M, columns):
    """What a tile's ``values`` [BLOCK_M, WIDTH], float32, of columns ``first`` on say of the rows ``m``: to ``parts``
    [2, columns / WIDTH, M], means and then sums of squared deviations."""
    WIDTH: tl.constexpr = values.shape[1]
    there = (first + tl.arange(0, WIDTH) < columns)[None, :]
    mean = tl.sum(tl.where(there, values, 0.0), 1) / tl.minimum(columns - first, WIDTH)
    offset = tl.where(there, values - mean[:, None], 0.0)
    at = parts + first // WIDTH * M + m
    mask = (m < M) & (first < columns)
    tl.store(at, mean, mask=mask)
    tl.store(at + tl.cdiv(columns, WIDTH) * M, tl.sum(offset * offset, 1), mask=mask)


@triton.jit
def row_norm(parts, part_width, rows, M, C, eps, PARTS: tl.constexpr):
    """(means, 1 / deviations) of ``rows`` [BLOCK_M] of C values, from their parts, of which there are PARTS at most."""
    count = tl.cdiv(C, part_width)
    part = tl.arange(0, PARTS)
    there = (part < count)[:, None]
    n = tl.maximum(tl.minimum(C - part * part_width, part_width), 0).to(tl.float32)[:, None]
    at = parts + part[:, None] * M + rows[None, :]
    means = tl.load(at, mask=there, other=0.0)
    mean = tl.sum(means * n, 0) / C
    offset = means - mean[None, :]
    squares = tl.sum(tl.load(at + count * M, mask=there, other=0.0) + n * offset * offset, 0)
    return mean, tl.rsqrt(squares / C + eps)


@triton.jit
def apply_row_norm(acc, mean, scale, sums, rows_n, SPLIT: tl.constexpr):
    """acc [BLOCK_M, BLOCK_N] of rows as they are -> of normalised ones; ``sums`` [N] are the weights' with their gain.

    Where K is split each program scales its own part, and the first takes off what the mean has added.
    """
    off = mean * scale
    if SPLIT:
        off = tl.where(tl.program_id(1) == 0, off, 0.0)
    return acc * scale[:, None] - off[:, None] * tl.load(sums + rows_n)[None, :]
