"""Error-compensating rounding inside ordinary GGML blocks.

Rounding a weight w of a layer to q changes the layer's output by (q - w) x. With the second moments H = E[x x^T] of its
inputs the expected squared change of a row's output is (q - w)^T H (q - w), which is not the sum over weights that
rounding to the nearest minimises: what one weight's rounding does wrong, the weights not yet rounded can make good as
far as their inputs are correlated (GPTQ: Frantar et al. 2022, arXiv:2210.17323; Optimal Brain Surgeon before it).

With H^-1 = U^T U, U upper triangular, rounding column j with error e = (w_j - q_j) / U_jj costs e^2, whatever comes
later, if the later columns k take w_k -= e U_jk. Here the columns go by blocks of 32, which share a scale (and a
minimum). For every block each of a handful of scales is tried all the way, its columns rounded and compensated in
turn, and the scale with the smallest cost is kept: the cost is that of the format as it will be decoded, fields in
float16. The blocks with the largest inputs go first, as errors that come late find fewer columns to be made good by.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from gguf_sd_convert.quantize.scales import AFFINE_CUTS, SYMMETRIC_SCALES, pack, reciprocal, to_f16
from gguf_sd_kernels.formats import BlockFormat, block_format, row_bytes

DAMPING = 0.01  # of the mean of H's diagonal, added to it
LEAST = 512  # rows of a triangular matrix that are inverted at once


@dataclass(frozen=True)
class Rounded:
    """A weight's blocks, uint8 [rows, bytes of a row], the values that they stand for, float32 [rows, cols], and the
    expected squared change of each row's output, [rows]."""

    blocks: Tensor
    values: Tensor
    cost: Tensor


def inverse_factor(moments: Tensor, order: Tensor | None = None, damping: float = DAMPING) -> Tensor:
    """U, upper triangular, with U^T U the inverse of the damped moments [n, n], their columns in ``order``. Inputs that
    were never other than zero are as if each had the mean's share, so that they are rounded to the nearest."""
    mean = float(moments.diagonal().mean()) or 1.0
    backwards = (torch.arange(len(moments)) if order is None else order).flip(0)
    while True:
        damped = moments[backwards[:, None], backwards]  # moments = upper upper^T, from the end: half a gigabyte
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        del damped
        if not int(failed):
            break
        damping *= 10
    upper = lower.flip(0, 1)
    del lower
    return _inverse(upper)  # (upper upper^T)^-1 = (upper^-1)^T upper^-1


def _inverse(upper: Tensor) -> Tensor:
    """Of an upper triangular matrix; in place where it is large. By halves, as a third of what solving for a whole
    identity takes is not known to be zero."""
    n = len(upper)
    if n <= LEAST:
        return torch.linalg.solve_triangular(upper, torch.eye(n, dtype=upper.dtype), upper=True)
    a, b, d = (slice(0, n // 2), slice(0, n // 2)), (slice(0, n // 2), slice(n // 2, n)), (slice(n // 2, n),) * 2
    solved = torch.linalg.solve_triangular(upper[a], upper[b], upper=True)
    upper[b] = -torch.linalg.solve_triangular(upper[d], solved, upper=True, left=False)
    upper[a], upper[d] = _inverse(upper[a]), _inverse(upper[d])
    return upper


def _of_diagonal(diagonal: Tensor, damping: float) -> Tensor:
    """As :func:`inverse_factor`, of inputs that have nothing to do with each other: its diagonal."""
    mean = float(diagonal.mean()) or 1.0
    return (diagonal + damping * mean).rsqrt()


def block_order(diagonal: Tensor, size: int) -> Tensor:
    """The columns, [n]: blocks of ``size`` by falling sum of their mean squares, and by falling ones inside each."""
    diagonal = diagonal.view(-1, size)
    blocks = diagonal.sum(1).argsort(descending=True)
    inside = diagonal.argsort(dim=1, descending=True)
    return (blocks[:, None] * size + inside[blocks]).flatten()


def round_compensated(weight: Tensor, moments: Tensor, qtype: str, damping: float = DAMPING) -> Rounded:
    """Rounds a weight [rows, cols] to ``qtype`` (a format of blocks of 32) for inputs of these second moments
    [cols, cols], or [cols] of which only the diagonal is known: then nothing is made good, but the scales heed it.
    Raises ValueError for a type or a width that does not do."""
    fmt = block_format(qtype)
    rows, cols = weight.shape
    row_bytes(qtype, cols)
    size = fmt.block_size
    known = moments.dim() == 2
    order = block_order(moments.diagonal() if known else moments, size)
    factor = inverse_factor(moments, order, damping) if known else _of_diagonal(moments[order], damping)
    del moments  # of which there may be half a gigabyte
    w = weight.float()[:, order].clone()
    codes = torch.empty(rows, cols // size, size)
    fields: list[Tensor] = [torch.empty(rows, cols // size) for _ in range(2 if fmt.min_bytes else 1)]
    cost = torch.zeros(rows)
    values = torch.empty_like(w)
    for start in range(0, cols, size):
        block = slice(start, start + size)
        own = factor[block, block] if known else torch.diag(factor[block])
        at, inside = divmod_block(order[block], size)
        best = _best(w[:, block], own, _scales(w[:, block], own, fmt), fmt)
        best = _best(w[:, block], own, _refitted(w[:, block], own, best, fmt), fmt, best)
        codes[:, at] = codes[:, at].index_copy(1, inside, best.codes)
        for field, value in zip(fields, best.fields, strict=True):
            field[:, at] = value
        cost += best.cost
        values[:, block] = best.values
        if known and block.stop < cols:
            w[:, block.stop :].addmm_(best.errors, factor[block, block.stop :], alpha=-1)
    out = torch.empty(rows, row_bytes(qtype, cols), dtype=torch.uint8)
    _pack_codes(codes, fields, fmt, out)
    back = torch.empty_like(values)
    back[:, order] = values
    return Rounded(out, back, cost)


def divmod_block(columns: Tensor, size: int) -> tuple[int, Tensor]:
    """The block that columns are of, and their places in it."""
    return int(columns[0]) // size, columns % size


@dataclass(frozen=True)
class _Choice:
    """Of each row: codes [rows, 32], the block's float16 fields [rows] each, values and scaled errors [rows, 32],
    cost [rows]."""

    codes: Tensor
    fields: tuple[Tensor, ...]
    values: Tensor
    errors: Tensor
    cost: Tensor


def code_range(fmt: BlockFormat) -> tuple[int, int]:
    """The smallest and the largest code of a format, its zero point taken off."""
    if fmt.quant_bytes == fmt.block_size:
        return -127, 127
    levels = 32 if fmt.high_bytes else 16
    return (-fmt.zero_point, levels - 1 - fmt.zero_point)


def _scales(w: Tensor, own: Tensor, fmt: BlockFormat) -> tuple[Tensor, Tensor]:
    """The scales and minima to try for blocks [rows, 32]: [candidates, rows, 1] each."""
    low, high = code_range(fmt)
    largest, smallest = w.amax(1, keepdim=True), w.amin(1, keepdim=True)
    if fmt.min_bytes:
        pairs = product(AFFINE_CUTS[high], repeat=2)
        cuts = [(a, b) for a, b in pairs]
        reach = largest - smallest
        d = torch.stack([reach * (1 - a - b) / high for a, b in cuts])
        m = torch.stack([smallest + a * reach for a, b in cuts])
        return d, m
    extreme = torch.where(largest > -smallest, largest, smallest)
    if fmt.quant_bytes == fmt.block_size:
        d = torch.stack([extreme.abs() / high])
    else:
        d = torch.stack([extreme / low * factor for factor in (0.82, *SYMMETRIC_SCALES[fmt.zero_point])])
        d = torch.cat([d, -d[-3:]])
    return d, torch.zeros_like(d)


def _refitted(w: Tensor, own: Tensor, best: _Choice, fmt: BlockFormat) -> tuple[Tensor, Tensor]:
    """For the codes chosen, the scale (and minimum) that costs least: the block's own metric is that which is left
    once all later columns have made good what they can, (U_BB^T U_BB)^-1."""
    to_errors = torch.linalg.solve_triangular(own, torch.eye(len(own)), upper=True)  # (w - q) @ it = errors
    target, q = w @ to_errors, best.codes @ to_errors
    if fmt.min_bytes:
        one = (torch.ones(1, len(own)) @ to_errors).expand_as(q)
        qq, q1, oo = (q * q).sum(1), (q * one).sum(1), (one * one).sum(1)
        qt, ot = (q * target).sum(1), (one * target).sum(1)
        det = (qq * oo - q1 * q1).clamp(min=1e-20)
        d, m = (qt * oo - ot * q1) / det, (ot * qq - qt * q1) / det
        return d[None, :, None], m[None, :, None]
    d = (q * target).sum(1) / (q * q).sum(1).clamp(min=1e-20)
    return d[None, :, None], torch.zeros_like(d)[None, :, None]


def _best(
    w: Tensor, own: Tensor, candidates: tuple[Tensor, Tensor], fmt: BlockFormat, known: _Choice | None = None
) -> _Choice:
    """Rounds blocks [rows, 32] by every candidate, each column's error made good by the next ones, and keeps the
    cheapest, or what is ``known`` already where that is."""
    low, high = code_range(fmt)
    d, m = (to_f16(candidates[0].nan_to_num(0.0, 0.0, 0.0)), candidates[1].clamp(-65504, 65504).half().float())
    d, m, n = d[..., 0], m[..., 0], len(own)
    per_d = reciprocal(d)
    left = w.T[:, None].repeat(1, len(d), 1)  # [32, candidates, rows], as errors go from column to column
    codes, errors = torch.empty_like(left), torch.empty_like(left)
    for j in range(n):
        torch.sub(left[j], m, out=codes[j]).mul_(per_d).round_().clamp_(low, high)
        torch.addcmul(m, codes[j], d, out=errors[j])
        torch.sub(left[j], errors[j], out=errors[j]).div_(own[j, j])
        if j + 1 < n:
            left[j + 1 :].view(n - j - 1, -1).addr_(own[j, j + 1 :], errors[j].view(-1), alpha=-1)
    cost = errors.square().sum(0)
    least, index = cost.min(0)
    index = index[None]

    def pick(x: Tensor) -> Tensor:
        return x.gather(-2, index.expand(*x.shape[:-2], *index.shape)).squeeze(-2)

    own_d, own_m, own_codes = pick(d), pick(m), pick(codes).T
    fields = (own_d, own_m) if fmt.min_bytes else (own_d,)
    values = torch.addcmul(own_m[:, None], own_codes, own_d[:, None])
    choice = _Choice(own_codes, fields, values, pick(errors).T, least)
    if known is None:
        return choice
    worse = known.cost <= choice.cost

    def either(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(worse if a.dim() == 1 else worse[:, None], a, b)

    return _Choice(
        either(known.codes, choice.codes),
        tuple(either(a, b) for a, b in zip(known.fields, choice.fields, strict=True)),
        either(known.values, choice.values),
        either(known.errors, choice.errors),
        either(known.cost, choice.cost),
    )


def _pack_codes(codes: Tensor, fields: list[Tensor], fmt: BlockFormat, out: Tensor) -> None:
    """Codes [rows, blocks, 32] and fields [rows, blocks] to the format's bytes."""
    packed = out.view(-1, fmt.type_size)
    scales = [field.reshape(-1, 1) for field in fields]
    flat = codes.view(-1, fmt.block_size)
    if fmt.quant_bytes == fmt.block_size:
        packed[:, :2] = scales[0].half().view(torch.uint8)
        packed[:, 2:] = flat.to(torch.int8).view(torch.uint8)
    else:
        pack(flat + fmt.zero_point, scales, fmt, packed)
