"""GGML block formats: how a row of weights lies in a GGUF file, for the types that stay quantised in memory.

A row of n values is n / block_size blocks of type_size bytes, one after another. Fields are little-endian and
stand in the order given here. Source: ggml's ``ggml-common.h`` and gguf-py's ``quants.py``.

Codes narrower than a byte are split over runs, not interleaved: a run of r bytes carries r codes in its lowest
bits, the next r codes in the bits above, and so on. In the five formats of :class:`BlockFormat`, 32 values
share a block and 16 bytes are a run, so byte j carries value j in its low half and value j + 16 in its high half.

    byte j of qs      7 6 5 4 | 3 2 1 0
                     value j+16 value j
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BlockFormat:
    """One quantised type: its ggml type id and the sizes in bytes of a block's fields, in file order.

    value = d * (q - zero_point) + m, in float32; formats without ``min_bytes`` have no m.
    """

    name: str
    ggml_type: int
    block_size: int  # values a block
    scale_bytes: int  # d, float16
    min_bytes: int  # m, float16
    high_bytes: int  # fifth bits, bit i of the little-endian word belongs to value i
    quant_bytes: int  # nibbles, or int8 values
    zero_point: int

    @property
    def field_bytes(self) -> tuple[int, ...]:
        """Bytes of each field, in file order."""
        return self.scale_bytes, self.min_bytes, self.high_bytes, self.quant_bytes

    @property
    def type_size(self) -> int:
        """Bytes a block."""
        return sum(self.field_bytes)


@dataclass(frozen=True)
class FieldFormat:
    """A type with a decoder of its own (:mod:`gguf_sd_kernels.reference.decoders`): K-quants and the non-linear 4-bit
    types.

    A K-quant's block is a super-block: d, and dmin where it has one, are float16 for all of its 256 values; every
    16 or 32 of them share a scale, and a minimum, of a few bits. With a scale sc, a minimum mn and a code q,
    value = d * sc * q - dmin * mn.
    """

    name: str
    ggml_type: int
    block_size: int  # values a block
    field_bytes: tuple[int, ...]  # bytes of each field, in file order

    @property
    def type_size(self) -> int:
        """Bytes a block."""
        return sum(self.field_bytes)


QuantFormat = BlockFormat | FieldFormat

FORMATS: dict[str, QuantFormat] = {
    f.name: f
    for f in (
        # | d 2 | qs 16 |                      d * (nibble - 8)
        BlockFormat("Q4_0", 2, 32, scale_bytes=2, min_bytes=0, high_bytes=0, quant_bytes=16, zero_point=8),
        # | d 2 | m 2 | qs 16 |                d * nibble + m
        BlockFormat("Q4_1", 3, 32, scale_bytes=2, min_bytes=2, high_bytes=0, quant_bytes=16, zero_point=0),
        # | d 2 | qh 4 | qs 16 |               d * ((bit << 4 | nibble) - 16)
        BlockFormat("Q5_0", 6, 32, scale_bytes=2, min_bytes=0, high_bytes=4, quant_bytes=16, zero_point=16),
        # | d 2 | m 2 | qh 4 | qs 16 |         d * (bit << 4 | nibble) + m
        BlockFormat("Q5_1", 7, 32, scale_bytes=2, min_bytes=2, high_bytes=4, quant_bytes=16, zero_point=0),
        # | d 2 | qs 32 as int8 |              d * q
        BlockFormat("Q8_0", 8, 32, scale_bytes=2, min_bytes=0, high_bytes=0, quant_bytes=32, zero_point=0),
        # | scales 16 | qs 64 | d 2 | dmin 2 |            d * scale * q - dmin * min
        FieldFormat("Q2_K", 10, 256, (16, 64, 2, 2)),
        # | hmask 32 | qs 64 | scales 12 | d 2 |          d * (scale - 32) * ((bit << 2 | q) - 4)
        FieldFormat("Q3_K", 11, 256, (32, 64, 12, 2)),
        # | d 2 | dmin 2 | scales 12 | qs 128 |           d * scale * nibble - dmin * min
        FieldFormat("Q4_K", 12, 256, (2, 2, 12, 128)),
        # | d 2 | dmin 2 | scales 12 | qh 32 | qs 128 |   d * scale * (bit << 4 | nibble) - dmin * min
        FieldFormat("Q5_K", 13, 256, (2, 2, 12, 32, 128)),
        # | ql 128 | qh 64 | scales 16 as int8 | d 2 |    d * scale * ((2 bits << 4 | nibble) - 32)
        FieldFormat("Q6_K", 14, 256, (128, 64, 16, 2)),
        # | d 2 | qs 16 |                                 d * table[nibble]
        FieldFormat("IQ4_NL", 20, 32, (2, 16)),
        # | d 2 | scales_h 2 | scales_l 4 | qs 128 |      d * (scale - 32) * table[nibble]
        FieldFormat("IQ4_XS", 23, 256, (2, 2, 4, 128)),
    )
}


def quant_format(qtype: str) -> QuantFormat:
    """The format called ``qtype`` ("Q4_K"); raises ValueError for a name that is not in the table."""
    try:
        return FORMATS[qtype]
    except KeyError:
        raise ValueError(f"no block format {qtype!r}; choose from {', '.join(FORMATS)}") from None


def block_format(qtype: str) -> BlockFormat:
    """As :func:`quant_format`, for code that works on the fields of a block of 32 values ("Q4_0"); raises
    ValueError for the types with a decoder of their own too."""
    fmt = quant_format(qtype)
    if not isinstance(fmt, BlockFormat):
        simple = ", ".join(name for name, f in FORMATS.items() if isinstance(f, BlockFormat))
        raise ValueError(f"{qtype} can only be decoded; choose from {simple}")
    return fmt


def row_bytes(qtype: str, n: int) -> int:
    """Bytes of a row of ``n`` values; raises ValueError when ``n`` is not a whole number of blocks."""
    fmt = quant_format(qtype)
    if n <= 0 or n % fmt.block_size:
        raise ValueError(f"a {qtype} row holds a positive multiple of {fmt.block_size} values, got {n}")
    return n // fmt.block_size * fmt.type_size


def row_values(qtype: str, n_bytes: int) -> int:
    """Values in a row of ``n_bytes`` bytes; raises ValueError when that is not a whole number of blocks."""
    fmt = quant_format(qtype)
    if n_bytes <= 0 or n_bytes % fmt.type_size:
        raise ValueError(f"{qtype} blocks have {fmt.type_size} bytes; a row of {n_bytes} bytes does not fit them")
    return n_bytes // fmt.type_size * fmt.block_size
