"""The blocks of a GGUF file taken apart into arrays that a GPU reads well, and put together again.

An 18-byte Q4_0 block starts on a 2-byte boundary: a GPU reads it in 2-byte pieces, and not asynchronously.
Repacked, quants, scales and minima lie in arrays of their own, aligned, at the same total size. No bit is lost:
:func:`unpack` gives the file's blocks back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from gguf_sd_kernels.formats import block_format, row_values

PACKED_TYPES = ("Q4_0", "Q4_1", "Q8_0")


@dataclass(frozen=True)
class PackedWeight:
    """A weight of N rows (outputs) of K values, as the Triton kernels read it.

    ``quants`` is uint8: ``[N, K/2]`` nibbles in the order of the file (in each 16 bytes, low halves are values
    0-15 and high halves 16-31), or for Q8_0 ``[N, K]``, value + 128. ``scales`` and ``mins`` are float16
    ``[N, K/32]``. ``shape`` is the logical shape, ``(N, K)`` or ``(OC, IC, KH, KW)``; the rows of a convolution
    hold (KH, KW, IC) where ``tap_major``, else (IC, KH, KW).
    """

    quants: Tensor
    scales: Tensor
    mins: Tensor | None
    qtype: str
    shape: tuple[int, ...]
    tap_major: bool = False

    def __post_init__(self) -> None:
        for name, tensor in (("quants", self.quants), ("scales", self.scales), ("mins", self.mins)):
            if tensor is not None and not tensor.is_contiguous():
                raise ValueError(f"the {name} of a packed weight must be contiguous, got strides {tensor.stride()}")

    @cached_property
    def kind(self) -> tuple[str, tuple[int, ...], bool]:
        """All that a launch depends on: weights of one kind share what was prepared for it."""
        return self.qtype, self.shape, self.tap_major

    @property
    def rows(self) -> int:
        """N: how many outputs the weight has."""
        return self.shape[0]

    @property
    def cols(self) -> int:
        """K: how many values are in a row."""
        return math.prod(self.shape[1:])

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays together; the same as the file's."""
        return sum(t.numel() * t.element_size() for t in (self.quants, self.scales, self.mins) if t is not None)

    @property
    def device(self) -> torch.device:
        return self.quants.device

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedWeight:
        """The same weight on another device."""
        mins = None if self.mins is None else self.mins.to(device, non_blocking=non_blocking)
        return replace(
            self,
            quants=self.quants.to(device, non_blocking=non_blocking),
            scales=self.scales.to(device, non_blocking=non_blocking),
            mins=mins,
        )


def repack(
    blocks: Tensor, qtype: str, shape: tuple[int, ...] | None = None, *, tap_major: bool = False
) -> PackedWeight:
    """Takes blocks apart, uint8 ``[N, row_bytes]`` as they lie in the file, on the device they are on.

    ``shape`` is the logical shape, ``(N, K)`` by default. Raises ValueError for a type outside PACKED_TYPES, or
    blocks that do not hold ``shape``.
    """
    if qtype not in PACKED_TYPES:
        raise ValueError(f"no kernel reads {qtype} blocks; choose from {', '.join(PACKED_TYPES)}, or dequantize them")
    if blocks.dtype != torch.uint8 or blocks.ndim != 2:
        raise ValueError(f"{qtype} blocks are uint8 [rows, row_bytes], got {blocks.dtype} {list(blocks.shape)}")
    rows, cols = blocks.shape[0], row_values(qtype, blocks.shape[1])
    shape = (rows, cols) if shape is None else tuple(shape)
    if shape[0] != rows or math.prod(shape[1:]) != cols:
        raise ValueError(f"{qtype} blocks of {rows} rows of {cols} values do not hold a weight of shape {list(shape)}")
    d, m, q = _fields(blocks, qtype)
    quants = q.reshape(rows, -1)
    return PackedWeight(
        quants=quants ^ 0x80 if qtype == "Q8_0" else quants.contiguous(),
        scales=_halves(d),
        mins=_halves(m) if m.shape[2] else None,
        qtype=qtype,
        shape=shape,
        tap_major=tap_major,
    )


def repack_into(blocks: Tensor, packed: PackedWeight, first_row: int = 0) -> None:
    """Takes blocks apart into the rows of ``packed`` from ``first_row``, on one device; allocates nothing. For weights
    that come and go. Raises ValueError for blocks of another width, or more rows than there are."""
    rows, stop = blocks.shape[0], first_row + blocks.shape[0]
    if row_values(packed.qtype, blocks.shape[1]) != packed.cols or stop > packed.rows:
        raise ValueError(f"blocks {list(blocks.shape)} from row {first_row} do not fit {list(packed.quants.shape)}")
    d, m, q = _fields(blocks, packed.qtype)
    quants = packed.quants[first_row:stop].view(q.shape)
    if packed.qtype == "Q8_0":
        torch.bitwise_xor(q, 0x80, out=quants)
    else:
        quants.copy_(q)
    for field, halves in ((d, packed.scales), (m, packed.mins)):
        if halves is not None:
            halves[first_row:stop].view(torch.uint8).view(rows, -1, 2).copy_(field)


def _fields(blocks: Tensor, qtype: str) -> tuple[Tensor, Tensor, Tensor]:
    """Scales, minima and quants of blocks, uint8 ``[N, blocks, bytes]``, views."""
    fmt = block_format(qtype)
    sizes = [fmt.scale_bytes, fmt.min_bytes, fmt.high_bytes, fmt.quant_bytes]
    d, m, _, q = blocks.reshape(blocks.shape[0], -1, fmt.type_size).split(sizes, dim=2)
    return d, m, q


def unpack(weight: PackedWeight) -> Tensor:
    """The file's blocks again, uint8 ``[N, row_bytes]``."""
    fmt = block_format(weight.qtype)
    rows, blocks = weight.scales.shape
    quants = weight.quants ^ 0x80 if weight.qtype == "Q8_0" else weight.quants
    fields = [weight.scales, *([] if weight.mins is None else [weight.mins])]
    parts = [f.contiguous().view(torch.uint8).view(rows, blocks, 2) for f in fields]
    return torch.cat([*parts, quants.view(rows, blocks, fmt.quant_bytes)], dim=2).view(rows, -1)


def _halves(field: Tensor) -> Tensor:
    """uint8 ``[N, blocks, 2]`` -> float16 ``[N, blocks]``, the same bits."""
    return field.contiguous().view(torch.float16).squeeze(2)
