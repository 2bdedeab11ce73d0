"""Weights to K-quants (Q4_K, Q5_K, Q6_K) and to IQ4_NL, their scales searched.

A K-quant's 256 values share one float16 scale d (and dmin); every 16 or 32 of them have a scale, and a minimum, of a
few bits in units of d (and dmin). First each group gets the scale and minimum that would be best were they free; then
they are rounded to the super-block's units, their neighbours tried too, and d and dmin fitted by least squares to what
came out. Every comparison is of the error as it will be decoded.

Everything works on [super-blocks, groups, values] in slices that stay in the processor's cache. Format: ggml's
``ggml-common.h``; decoding is in :mod:`gguf_sd_kernels.reference.decoders`.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from gguf_sd_convert.quantize.scales import AFFINE_CUTS, F16_MAX, reciprocal, to_f16
from gguf_sd_kernels.reference.decoders import IQ4_VALUES

SUPER = 256
ROUNDS = 2  # of trying the neighbours of all scales and fitting d again; a third gains under 0.1 %

# Candidate scales of a group of Q6_K as multiples of the largest value's; of IQ4_NL as multiples of the scale that
# takes the largest value to the table's end.
Q6_FACTORS = (0.94, 0.97, 1.0, 1.03)
IQ4_FACTORS = (0.82, 0.88, 0.94, 1.0, 1.06, 1.12)


def q4_k(x: Tensor, out: Tensor) -> None:
    """Super-blocks [n, 256] to bytes [n, 144]."""
    codes, d, dmin, scales, minima = _with_minima(x, 15)
    out[:, :2], out[:, 2:4] = _half(d), _half(dmin)
    out[:, 4:16] = _packed_scales(scales, minima)
    put_codes(out, codes, "Q4_K")


def q5_k(x: Tensor, out: Tensor) -> None:
    """Super-blocks [n, 256] to bytes [n, 176]."""
    codes, d, dmin, scales, minima = _with_minima(x, 31)
    out[:, :2], out[:, 2:4] = _half(d), _half(dmin)
    out[:, 4:16] = _packed_scales(scales, minima)
    put_codes(out, codes, "Q5_K")


def q6_k(x: Tensor, out: Tensor) -> None:
    """Super-blocks [n, 256] to bytes [n, 210]."""
    groups = x.view(-1, 16, 16)
    unit = _signed_extreme(groups) / -32
    best, scale = torch.full_like(unit, -1.0), unit.clone()
    per_unit = reciprocal(unit)
    for factor in Q6_FACTORS:
        q = (groups * (per_unit / factor)).round_().clamp_(-32, 31)
        qx, qq = (q * groups).sum(2, keepdim=True), q.square().sum(2, keepdim=True).clamp_(min=1e-20)
        gain = qx.square() / qq
        better = gain > best
        best, scale = torch.where(better, gain, best), torch.where(better, qx / qq, scale)
    widest = scale.abs().amax(1, keepdim=True)
    d = to_f16(scale.gather(1, scale.abs().argmax(1, keepdim=True)).sign() * widest / -128)
    codes, sc = _try_scales(groups, d, (scale * reciprocal(d)).round_().clamp_(-128, 127))
    for _ in range(ROUNDS):
        product_ = sc * codes
        fitted = (product_ * groups).sum((1, 2), keepdim=True) / product_.square().sum((1, 2), keepdim=True).clamp_(
            min=1e-20
        )
        d = _better(groups, codes, sc, d, to_f16(fitted))
        codes, sc = _try_scales(groups, d, sc)
    put_codes(out, (codes.flatten(1) + 32).to(torch.uint8), "Q6_K")
    out[:, 192:208] = sc[:, :, 0].to(torch.int8).view(torch.uint8)
    out[:, 208:] = _half(d[:, :, 0])


def iq4_nl(x: Tensor, out: Tensor) -> None:
    """Blocks [n, 32] to bytes [n, 18]: value = d * table[nibble]."""
    table = torch.tensor(IQ4_VALUES, dtype=torch.float32)
    between = (table[1:] + table[:-1]) / 2
    extreme = _signed_extreme(x)
    best = torch.full_like(extreme, float("inf"))
    scale, index = torch.zeros_like(extreme), torch.zeros(x.shape, dtype=torch.int64)

    def attempt(d: Tensor, best: Tensor, scale: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        d = to_f16(d)
        q = torch.bucketize(x * reciprocal(d), between)
        values = table[q]
        error = (values * d - x).square().sum(1, keepdim=True)
        better = error < best
        fitted = (values * x).sum(1, keepdim=True) / values.square().sum(1, keepdim=True).clamp_(min=1e-20)
        state = torch.where(better, error, best), torch.where(better, d, scale), torch.where(better, q, index)
        return *state, fitted

    for end, factor in product((table[0], table[-1]), IQ4_FACTORS):
        d = extreme / end * factor
        for _ in range(2):
            best, scale, index, d = attempt(d, best, scale, index)
    out[:, :2] = _half(scale)
    put_codes(out, index.to(torch.uint8), "IQ4_NL")


def put_codes(out: Tensor, codes: Tensor, qtype: str) -> None:
    """Writes codes uint8 [n, values], counted from 0, into blocks [n, bytes], whose other fields stay."""
    if qtype == "Q4_K":
        out[:, 16:] = _pack_runs(codes, 4, 32)
    elif qtype == "Q5_K":
        out[:, 16:48], out[:, 48:] = _pack_runs(codes >> 4, 1, 32), _pack_runs(codes & 15, 4, 32)
    elif qtype == "Q6_K":
        out[:, :128], out[:, 128:192] = _pack_runs(codes & 15, 4, 64), _pack_runs(codes >> 4, 2, 32)
    else:
        out[:, 2:] = _pack_runs(codes, 4, 16)


ENCODERS: dict[str, Callable[[Tensor, Tensor], None]] = {"Q4_K": q4_k, "Q5_K": q5_k, "Q6_K": q6_k, "IQ4_NL": iq4_nl}


def _signed_extreme(x: Tensor) -> Tensor:
    """The value of the largest magnitude along the last dimension, which is kept."""
    largest, smallest = x.amax(-1, keepdim=True), x.amin(-1, keepdim=True)
    return torch.where(largest > -smallest, largest, smallest)


def _try_scales(x: Tensor, d: Tensor, sc: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [n, 16, 16] and scales [n, 16, 1] of Q6_K: the scales given or a neighbour, as costs least."""
    best = torch.full_like(sc, float("inf"))
    codes, chosen = torch.zeros_like(x), sc
    for step in (0, -1, 1):
        candidate = (sc + step).clamp_(-128, 127)
        unit = d * candidate
        q = (x * reciprocal(unit)).round_().clamp_(-32, 31)
        error = (q * unit - x).square_().sum(2, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        codes, chosen = torch.where(better, q, codes), torch.where(better, candidate, chosen)
    return codes, chosen


def _better(x: Tensor, codes: Tensor, sc: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Of two d, [n, 1, 1], that with which the codes are nearer to x."""
    values = sc * codes
    errors = [(values * d - x).square_().sum((1, 2), keepdim=True) for d in (a, b)]
    return torch.where(errors[1] < errors[0], b, a)


def _with_minima(x: Tensor, levels: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Q4_K and Q5_K: value = d * scale * code - dmin * minimum. Codes uint8 [n, 256], d and dmin [n, 1], scales and
    minima uint8 [n, 8]."""
    groups = x.view(-1, 8, 32)
    scale, minimum = _free_line(groups, levels)
    d, dmin = to_f16(scale.amax(1, keepdim=True) / 63), to_f16(minimum.amax(1, keepdim=True) / 63)
    sc = (scale * reciprocal(d)).round_().clamp_(0, 63)
    mn = (minimum * reciprocal(dmin)).round_().clamp_(0, 63)
    codes, sc, mn, error = _try_neighbours(groups, d, dmin, sc, mn, levels)
    for _ in range(ROUNDS):
        fitted = _fit_units(groups, codes, sc, mn)
        new_d, new_dmin = to_f16(fitted[0].clamp(min=0)), to_f16(fitted[1].clamp(min=0))
        state = _try_neighbours(groups, new_d, new_dmin, sc, mn, levels)
        better = state[3] < error
        d, dmin, error = (torch.where(better, a, b) for a, b in ((new_d, d), (new_dmin, dmin), (state[3], error)))
        codes, sc, mn = (torch.where(better, a, b) for a, b in zip(state[:3], (codes, sc, mn), strict=True))
    whole = (t.to(torch.uint8) for t in (codes.flatten(1), sc[:, :, 0], mn[:, :, 0]))
    code, scales, minima = whole
    return code, d[:, :, 0], dmin[:, :, 0], scales, minima


def _free_line(x: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """For groups [n, 8, 32] the scale and the minimum (not negative, taken off) with the smallest squared error,
    [n, 8, 1] each, were they not rounded."""
    n = x.shape[2]
    largest, smallest = x.amax(2, keepdim=True), x.amin(2, keepdim=True).clamp_(max=0.0)
    reach, x_sum = largest - smallest, x.sum(2, keepdim=True)
    best = torch.full_like(reach, float("inf"))
    scale, minimum = reach / levels, -smallest
    for low, high in product(AFFINE_CUTS[levels], repeat=2):
        start = smallest + low * reach
        q = ((x - start) * reciprocal(reach * (1 - low - high) / levels)).round_().clamp_(0, levels)
        q_sum, qq, qx = (t.sum(2, keepdim=True) for t in (q, q * q, q * x))
        d = (n * qx - q_sum * x_sum) / (n * qq - q_sum * q_sum).clamp_(min=1e-20)
        m = (d * q_sum - x_sum) / n
        d = torch.where(m < 0, qx / qq.clamp(min=1e-20), d)
        m = m.clamp_(min=0)
        error = (q * d - m - x).square_().sum(2, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        scale, minimum = torch.where(better, d, scale), torch.where(better, m, minimum)
    return scale.clamp_(0, F16_MAX), minimum.clamp_(0, F16_MAX)


def _try_neighbours(
    x: Tensor, d: Tensor, dmin: Tensor, sc: Tensor, mn: Tensor, levels: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes, scales and minima: those given or neighbours, as costs least in each group; and the cost of each
    super-block."""
    best = torch.full_like(sc, float("inf"))
    codes, scales, minima = torch.zeros_like(x), sc, mn
    for a, b in product((0, -1, 1), repeat=2):
        s, m = (sc + a).clamp_(0, 63), (mn + b).clamp_(0, 63)
        unit, shift = d * s, dmin * m
        q = ((x + shift) * reciprocal(unit)).round_().clamp_(0, levels)
        error = (q * unit - shift - x).square_().sum(2, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        codes = torch.where(better, q, codes)
        scales, minima = torch.where(better, s, scales), torch.where(better, m, minima)
    return codes, scales, minima, best.sum(1, keepdim=True)


def _fit_units(x: Tensor, codes: Tensor, sc: Tensor, mn: Tensor) -> tuple[Tensor, Tensor]:
    """d and dmin, [n, 1, 1] each, with the smallest squared error for these codes, scales and minima."""
    a, b = sc * codes, -mn.expand_as(codes)
    aa, ab, bb, ax, bx = (t.sum((1, 2), keepdim=True) for t in (a * a, a * b, b * b, a * x, b * x))
    determinant = aa * bb - ab * ab
    alone = ax / aa.clamp(min=1e-20)
    solvable = determinant > 1e-6 * aa * bb
    safe = torch.where(solvable, determinant, 1.0)
    d = torch.where(solvable, (ax * bb - bx * ab) / safe, alone)
    return d, torch.where(solvable, (bx * aa - ax * ab) / safe, 0.0)


def _half(x: Tensor) -> Tensor:
    """float16 fields [n, 1] as bytes [n, 2]."""
    return x.half().contiguous().view(torch.uint8)


def _packed_scales(scales: Tensor, minima: Tensor) -> Tensor:
    """The 12 bytes that hold 8 scales and 8 minima of 6 bits, as
    :func:`gguf_sd_kernels.reference.decoders._scales_and_offsets` draws them."""
    low = [part[:, :4] | (part[:, 4:] >> 4 << 6) for part in (scales, minima)]
    return torch.cat([*low, (scales[:, 4:] & 15) | (minima[:, 4:] & 15) << 4], 1)


def _pack_runs(codes: Tensor, bits: int, run: int) -> Tensor:
    """Codes uint8 [n, values] in runs of ``run`` bytes: the first ``run`` codes in the lowest bits, and so on."""
    each = 8 // bits
    parts = codes.view(len(codes), -1, each, run)
    packed = parts[:, :, 0].clone()
    for i in range(1, each):
        packed |= parts[:, :, i] << (bits * i)
    return packed.flatten(1)
