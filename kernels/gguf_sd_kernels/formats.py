"""GGML block formats: how a row of weights lies in a GGUF file.

A row of n values is n / block_size blocks of type_size bytes, one after another. Fields are little-endian and
stand in the order given here. Source: ggml's ``ggml-common.h`` and gguf-py's ``quants.py``.

32 values share a block in all five formats. Nibbles are split, not interleaved: byte j carries value j in its
low half and value j + 16 in its high half.

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
    def type_size(self) -> int:
        """Bytes a block."""
        return self.scale_bytes + self.min_bytes + self.high_bytes + self.quant_bytes


FORMATS: dict[str, BlockFormat] = {
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
    )
}


def block_format(qtype: str) -> BlockFormat:
    """The format called ``qtype`` ("Q4_0"); raises ValueError for a name that is not in the table."""
    try:
        return FORMATS[qtype]
    except KeyError:
        raise ValueError(f"no block format {qtype!r}; choose from {', '.join(FORMATS)}") from None


def row_bytes(qtype: str, n: int) -> int:
    """Bytes of a row of ``n`` values; raises ValueError when ``n`` is not a whole number of blocks."""
    fmt = block_format(qtype)
    if n <= 0 or n % fmt.block_size:
        raise ValueError(f"a {qtype} row holds a positive multiple of {fmt.block_size} values, got {n}")
    return n // fmt.block_size * fmt.type_size


def row_values(qtype: str, n_bytes: int) -> int:
    """Values in a row of ``n_bytes`` bytes; raises ValueError when that is not a whole number of blocks."""
    fmt = block_format(qtype)
    if n_bytes <= 0 or n_bytes % fmt.type_size:
        raise ValueError(f"{qtype} blocks have {fmt.type_size} bytes; a row of {n_bytes} bytes does not fit them")
    return n_bytes // fmt.type_size * fmt.block_size
