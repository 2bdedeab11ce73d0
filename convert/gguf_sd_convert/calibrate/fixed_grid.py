"""Error-compensating rounding in formats whose scales hang together over many values: K-quants and IQ4_NL.

The scales are those that rounding to the nearest finds; then every value has its grid, and its code is chosen as in
:mod:`gguf_sd_convert.calibrate.compensate`, the errors of earlier columns made good.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gguf_sd_convert.calibrate.compensate import DAMPING, Rounded, block_order, inverse_factor
from gguf_sd_convert.quantize.k_quants import put_codes
from gguf_sd_convert.quantize.quantizers import quantize
from gguf_sd_convert.quantize.scales import reciprocal
from gguf_sd_kernels import ops
from gguf_sd_kernels.formats import quant_format
from gguf_sd_kernels.reference.decoders import IQ4_VALUES, decode_fields

LEVELS = {"Q4_K": (0, 15), "Q5_K": (0, 31), "Q6_K": (-32, 31)}  # the smallest and the largest code
LAZY = 128  # columns after which what they did wrong is taken to all later ones


class _Grid(NamedTuple):
    """Of every value, [rows, cols]: its scale and what is added."""

    scale: Tensor
    offset: Tensor


def round_on_grid(weight: Tensor, moments: Tensor, qtype: str, damping: float = DAMPING) -> Rounded:
    """Rounds a weight [rows, cols] to ``qtype`` for inputs of these second moments [cols, cols]."""
    fmt = quant_format(qtype)
    rows, cols = weight.shape
    blocks = quantize(weight, qtype)
    grid = _grid(blocks.view(-1, fmt.type_size), qtype, (rows, cols))
    order = block_order(moments.diagonal(), fmt.block_size)
    factor = inverse_factor(moments, order, damping)
    del moments
    w, scale, offset = (x[:, order].clone() for x in (weight.float(), *grid))
    per_scale = reciprocal(scale)
    codes, cost = torch.empty(rows, cols, dtype=torch.uint8), torch.zeros(rows)
    for start in range(0, cols, LAZY):
        stop = min(start + LAZY, cols)
        errors = torch.empty(rows, stop - start)
        for j in range(start, stop):
            code, value = _nearest((w[:, j] - offset[:, j]) * per_scale[:, j], qtype)
            error = (w[:, j] - (value * scale[:, j] + offset[:, j])) / factor[j, j]
            codes[:, order[j]], errors[:, j - start] = code, error
            if j + 1 < stop:
                w[:, j + 1 : stop].addr_(error, factor[j, j + 1 : stop], alpha=-1)
        cost += errors.square().sum(1)
        if stop < cols:
            w[:, stop:].addmm_(errors, factor[start:stop, stop:], alpha=-1)
    put_codes(blocks.view(-1, fmt.type_size), codes.view(-1, fmt.block_size), qtype)
    return Rounded(blocks, ops.dequantize(blocks, qtype), cost)


def _grid(blocks: Tensor, qtype: str, shape: tuple[int, int]) -> _Grid:
    decoded = decode_fields(blocks, quant_format(qtype))
    size = quant_format(qtype).block_size
    each = size // decoded.scale.shape[1]
    scale = decoded.scale.repeat_interleave(each, 1)
    offset = torch.zeros_like(scale) if decoded.offset is None else decoded.offset.repeat_interleave(each, 1)
    return _Grid(scale.view(shape), offset.view(shape))


def _nearest(z: Tensor, qtype: str) -> tuple[Tensor, Tensor]:
    """The code, counted from 0, and the value that it stands for in units of the scale."""
    if qtype not in LEVELS:
        table = torch.tensor(IQ4_VALUES, dtype=torch.float32)
        index = torch.bucketize(z, (table[1:] + table[:-1]) / 2)
        return index.to(torch.uint8), table[index]
    low, high = LEVELS[qtype]
    q = z.round().clamp_(low, high)
    return (q - low).to(torch.uint8), q
