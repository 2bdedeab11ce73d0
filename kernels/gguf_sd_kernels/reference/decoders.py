"""Decoding blocks to float32 in plain torch, on whatever device they are: one function a format.

Each gives the codes of its blocks, and for every group of values the scale and the offset that they share:
value = scale * code + offset. Products of the fields are exact in float32 (float16 has 11 bits, scales at most 7,
codes at most 6, table values 7), so the only rounding is that of the addition, as in gguf-py: results are
bit for bit those of ``gguf.quants.dequantize``.

Nothing here waits for the device. Tables that are copied to it are kept from their first use on, which has to come
before a CUDA graph is captured, like the first use of any kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from gguf_sd_kernels.formats import BlockFormat, QuantFormat

# The values that the codes of IQ4_NL and IQ4_XS stand for; ggml's kvalues_iq4nl.
IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


class Decoded(NamedTuple):
    """n blocks of b values in groups: value = scale * code + offset."""

    codes: Tensor  # uint8 or int8 [n, b]
    scale: Tensor  # float32 [n, groups]
    offset: Tensor | None = None  # float32 [n, groups]


def decode_into(values: Tensor, blocks: Tensor, fmt: QuantFormat) -> Tensor:
    """uint8 ``[n, type_size]`` -> float32 ``values [n, block_size]``, contiguous, which are returned."""
    decoded = decode_fields(blocks, fmt)
    groups = values.copy_(decoded.codes).view(*decoded.scale.shape, -1)
    groups *= decoded.scale.unsqueeze(-1)
    if decoded.offset is not None:
        groups += decoded.offset.unsqueeze(-1)
    return values


def decode_fields(blocks: Tensor, fmt: QuantFormat) -> Decoded:
    """Codes, scales and offsets of blocks, uint8 ``[n, type_size]``."""
    fields = blocks.split(fmt.field_bytes, dim=1)
    return _affine(fmt, *fields) if isinstance(fmt, BlockFormat) else _DECODERS[fmt.name](*fields)


def _affine(fmt: BlockFormat, d: Tensor, m: Tensor, high: Tensor, quants: Tensor) -> Decoded:
    """Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0: one group a block."""
    if fmt.quant_bytes == fmt.block_size:
        codes = quants.view(torch.int8)
    else:
        codes = _runs(quants, 4, 16)
        if fmt.high_bytes:
            codes |= _fifth_bits(high)
        if fmt.zero_point:
            codes = codes.view(torch.int8).sub_(fmt.zero_point)
    return Decoded(codes, _float(d), _float(m) if fmt.min_bytes else None)


def _q2_k(scales: Tensor, quants: Tensor, d: Tensor, dmin: Tensor) -> Decoded:
    """16 groups. Byte i of ``scales`` carries the scale of group i in its low half, the minimum in its high half."""
    return Decoded(_runs(quants, 2, 32), _float(d) * (scales & 15), -(_float(dmin) * (scales >> 4)))


def _q3_k(high: Tensor, quants: Tensor, scales: Tensor, d: Tensor) -> Decoded:
    """16 groups with scales of 6 bits: four of each in the first 8 bytes of ``scales``, two in the last 4.

    byte i          7 6 5 4 | 3 2 1 0            byte 8 + i    7 6 | 5 4 | 3 2 | 1 0
    low bits of       i + 8 |   i                high bits of i+12 | i+8 | i+4 |  i
    """
    codes = _runs(quants, 2, 32).bitwise_or_(_runs(high, 1, 32) << 2)
    sixes = _runs(scales[:, :8], 4, 8).bitwise_or_(_runs(scales[:, 8:], 2, 4) << 4)
    return Decoded(codes.view(torch.int8).sub_(4), _float(d) * sixes.view(torch.int8).sub_(32))


def _q4_k(d: Tensor, dmin: Tensor, scales: Tensor, quants: Tensor) -> Decoded:
    """8 groups."""
    return Decoded(_runs(quants, 4, 32), *_scales_and_offsets(d, dmin, scales))


def _q5_k(d: Tensor, dmin: Tensor, scales: Tensor, high: Tensor, quants: Tensor) -> Decoded:
    """8 groups; bit i of ``high``'s byte j is the fifth bit of value j of group i."""
    codes = _runs(quants, 4, 32).bitwise_or_(_runs(high, 1, 32) << 4)
    return Decoded(codes, *_scales_and_offsets(d, dmin, scales))


def _q6_k(quants: Tensor, high: Tensor, scales: Tensor, d: Tensor) -> Decoded:
    """16 groups."""
    codes = _runs(quants, 4, 64).bitwise_or_(_runs(high, 2, 32) << 4)
    return Decoded(codes.view(torch.int8).sub_(32), _float(d) * scales.view(torch.int8))


def _iq4_nl(d: Tensor, quants: Tensor) -> Decoded:
    """One group a block."""
    return Decoded(_iq4_codes(quants), _float(d))


def _iq4_xs(d: Tensor, scales_high: Tensor, scales_low: Tensor, quants: Tensor) -> Decoded:
    """8 groups with scales of 6 bits: the four low ones of neighbouring groups share a byte of ``scales_low``, the
    two high ones stand in ``scales_high`` one after another, from its lowest bits up."""
    sixes = _neighbours(scales_low, 4) | (_neighbours(scales_high, 2) << 4)
    return Decoded(_iq4_codes(quants), _float(d) * sixes.view(torch.int8).sub_(32))


_DECODERS: dict[str, Callable[..., Decoded]] = {
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
}


def _float(half: Tensor) -> Tensor:
    """uint8 ``[n, 2]``, a float16 -> float32 ``[n, 1]``."""
    return half.view(torch.float16).float()


def _scales_and_offsets(d: Tensor, dmin: Tensor, packed: Tensor) -> tuple[Tensor, Tensor]:
    """The scales and offsets of 8 groups, float32 ``[n, 8]`` each, from the 12 bytes of Q4_K and Q5_K, i < 4:

    byte i      7 6: high bits of scale i + 4      5 … 0: scale i
    byte i + 4  7 6: high bits of minimum i + 4    5 … 0: minimum i
    byte i + 8  7 … 4: low bits of minimum i + 4   3 … 0: low bits of scale i + 4
    """
    first, rest = packed.split([8, 4], dim=1)
    second = _runs(rest, 4, 4).bitwise_or_((first >> 2) & 0x30)
    sixes = torch.stack([first & 63, second], dim=1).view(-1, 2, 2, 4)  # [n, groups 0-3 or 4-7, scale or minimum, 4]
    scale, minimum = sixes[:, :, 0].flatten(1), sixes[:, :, 1].flatten(1)
    return _float(d) * scale, -(_float(dmin) * minimum)


def _runs(packed: Tensor, bits: int, run: int) -> Tensor:
    """Codes of ``bits`` bits, uint8 ``[n, bytes]`` -> uint8 ``[n, bytes * 8 / bits]``.

    Each run of ``run`` bytes gives the codes in its lowest bits, then those above.
    """
    packed, mask = packed.contiguous(), (1 << bits) - 1
    middle = [(packed >> shift) & mask for shift in range(bits, 8 - bits, bits)]
    return _alternate([packed & mask, *middle, packed >> 8 - bits], run)


def _neighbours(packed: Tensor, bits: int) -> Tensor:
    """As :func:`_runs` with runs of one byte: codes of a byte stand side by side, the lowest bits first."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).flatten(1)


def _iq4_codes(quants: Tensor) -> Tensor:
    """The values of nibbles in runs of 16 bytes, uint8 ``[n, bytes]`` -> int8 ``[n, 2 * bytes]``; both nibbles of a
    byte are looked up at once."""
    pairs = _iq4_pairs(quants.device).expand(len(quants), -1).gather(1, quants.long())
    return _alternate([(pairs & 0xFF).to(torch.uint8), (pairs >> 8).to(torch.int8)], 16).view(torch.int8)


def _alternate(parts: list[Tensor], run: int) -> Tensor:
    """The first ``run`` bytes of every part, then the second, …: contiguous ``[n, bytes]`` each -> uint8
    ``[n, bytes * parts]``. ``run`` is 4, 8 or a multiple of 16.

    Taking bits from contiguous bytes, which vectorises, and then moving them 16 at a time by calling them one
    complex128 takes a third of the time of writing them into place directly (Zen 5), two thirds of ``torch.cat``'s.
    """
    rows, size = parts[0].shape
    carrier = {4: torch.int32, 8: torch.int64}.get(run, torch.complex128)
    result = torch.empty(rows, size * len(parts), dtype=torch.uint8, device=parts[0].device)
    places = result.view(carrier).view(rows, size // run, len(parts), -1)
    for i, part in enumerate(parts):
        places[:, :, i] = part.view(carrier).view(rows, size // run, -1)
    return result


def _fifth_bits(high: Tensor) -> Tensor:
    """The bits of ``high`` from the lowest up, each as 16 or 0: uint8 ``[n, bytes]`` -> uint8 ``[n, 8 * bytes]``. Eight
    are looked up at once, which takes an eighth of the time of shifting them apart (Zen 5)."""
    spread = _spread_bits(high.device).index_select(0, high.flatten().int())
    return spread.view(torch.uint8).view(len(high), -1)


@cache
def _spread_bits(device: torch.device) -> Tensor:
    """For every byte its bits as 16 or 0 in the bytes of an int64, ``[256]``."""
    spread = [sum((byte >> i & 1) << (8 * i + 4) for i in range(8)) for byte in range(256)]
    return torch.tensor(spread, dtype=torch.int64, device=device)


@cache
def _iq4_pairs(device: torch.device) -> Tensor:
    """For every byte the values of its nibbles, int16 ``[256]``: the low nibble's in the low byte, as its bits."""
    pairs = [(IQ4_VALUES[byte >> 4] << 8) | (IQ4_VALUES[byte & 15] & 0xFF) for byte in range(256)]
    return torch.tensor(pairs, dtype=torch.int16, device=device)
