"""K-quants and the non-linear 4-bit types, decoded in plain torch, against gguf-py and against plain integers."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from gguf_sd_kernels import ops
from gguf_sd_kernels.formats import FieldFormat, block_format
from gguf_sd_kernels.reference import products as reference

# Where the float16 fields stand in a block.
HALVES = {
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
}
QTYPES = list(HALVES)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def blocks_of(qtype: str, rows: int, cols: int, seed: int, scales: str = "any") -> Tensor:
    """Blocks of random bytes, uint8 [rows, row_bytes]; float16 fields are any finite numbers, or ``small``."""
    rng = np.random.default_rng(seed)
    size, type_size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[qtype]]
    blocks = rng.integers(0, 256, (rows * cols // size, type_size), dtype=np.uint8)
    for at in HALVES[qtype]:
        half = rng.integers(0, 0x7C00, len(blocks), dtype=np.uint16)
        half |= rng.integers(0, 2, len(blocks), dtype=np.uint16) << 15
        if scales == "small":
            half = (rng.standard_normal(len(blocks)) * 1e-3).astype(np.float16).view(np.uint16)
        blocks[:, at : at + 2] = half[:, None].view(np.uint8)
    return torch.from_numpy(blocks.reshape(rows, -1))


def by_gguf(blocks: Tensor, qtype: str) -> Tensor:
    return torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[qtype]))


def assert_same_bits(got: Tensor, want: Tensor) -> None:
    """Equal to the sign of zero."""
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    bits = torch.int32 if got.dtype == torch.float32 else torch.int16
    assert torch.equal(got.view(bits), want.view(bits))


def test_all_types_with_a_decoder_of_their_own_are_here() -> None:
    assert [name for name, fmt in ops.FORMATS.items() if isinstance(fmt, FieldFormat)] == QTYPES


@pytest.mark.parametrize("qtype", QTYPES)
def test_format_is_ggmls(qtype: str) -> None:
    kind = gguf.GGMLQuantizationType[qtype]
    fmt = ops.FORMATS[qtype]
    assert (fmt.block_size, fmt.type_size) == gguf.GGML_QUANT_SIZES[kind]
    assert (fmt.name, fmt.ggml_type) == (qtype, kind)
    assert ops.row_bytes(qtype, 768) == 768 // fmt.block_size * fmt.type_size
    assert ops.row_values(qtype, 3 * fmt.type_size) == 3 * fmt.block_size
    with pytest.raises(ValueError, match=f"{qtype} row holds a positive multiple of {fmt.block_size} values, got 776"):
        ops.row_bytes(qtype, 776)
    with pytest.raises(ValueError, match=f"{qtype} can only be decoded; choose from Q4_0, .*Q8_0$"):
        block_format(qtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("qtype", QTYPES)
@pytest.mark.parametrize(("rows", "cols"), [(1, 256), (7, 768), (1366, 768)])  # the last a little above CHUNK_VALUES
def test_random_bytes_decode_as_in_gguf_py_rounded_once(qtype: str, dtype: torch.dtype, rows: int, cols: int) -> None:
    assert 1365 * 768 < reference.CHUNK_VALUES < 1366 * 768
    blocks = blocks_of(qtype, rows, cols, seed=rows)
    want = by_gguf(blocks, qtype).to(dtype)
    assert_same_bits(ops.dequantize(blocks, qtype, dtype), want)
    out = torch.full((rows, cols), float("nan"), dtype=dtype)
    assert ops.dequantize(blocks, qtype, dtype, out) is out
    assert_same_bits(out, want)


@pytest.mark.parametrize("qtype", QTYPES)
def test_chunks_of_any_size(qtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "CHUNK_VALUES", 1024)
    blocks = blocks_of(qtype, 11, 512, seed=3)
    for dtype in DTYPES:
        assert_same_bits(ops.dequantize(blocks, qtype, dtype), by_gguf(blocks, qtype).to(dtype))


@pytest.mark.parametrize("qtype", QTYPES)
def test_rows_cut_from_a_larger_tensor(qtype: str) -> None:
    wide = blocks_of(qtype, 6, 1024, seed=4)
    part = wide[1:5, ops.row_bytes(qtype, 256) : ops.row_bytes(qtype, 768)]
    assert_same_bits(ops.dequantize(part, qtype), by_gguf(part.contiguous(), qtype))


@pytest.mark.parametrize("qtype", QTYPES)
def test_extreme_codes_and_scales(qtype: str) -> None:
    """All bits 0, all 1, and each nibble alone, under the largest, smallest and signed zero scales."""
    type_size = ops.FORMATS[qtype].type_size
    halves = np.array([65504, -65504, 2**-24, -(2**-24), 0.0, -0.0, 1.0], np.float16)
    blocks = []
    for byte in (0x00, 0xFF, 0x0F, 0xF0, 0x80, 0x7F, 0x55, 0xAA):
        for d in halves:
            for dmin in halves if len(HALVES[qtype]) == 2 else (d,):
                block = np.full(type_size, byte, np.uint8)
                for at, half in zip(HALVES[qtype], (d, dmin), strict=False):
                    block[at : at + 2] = np.frombuffer(half.tobytes(), np.uint8)
                blocks.append(block)
    tensor = torch.from_numpy(np.stack(blocks))
    assert_same_bits(ops.dequantize(tensor, qtype), by_gguf(tensor, qtype))


# A block of each type decoded value by value, from ggml's description of the format. Scales are powers of two.


def filler(size: int) -> bytes:
    """Bytes without a pattern that a mix-up of fields or positions would preserve."""
    return bytes((i * i * 7 + i * 45 + 11) % 253 for i in range(size))


def six_bit(s: bytes, group: int) -> tuple[int, int]:
    """Scale and minimum of Q4_K and Q5_K."""
    if group < 4:
        return s[group] % 64, s[group + 4] % 64
    return s[group + 4] % 16 + s[group - 4] // 64 * 16, s[group + 4] // 16 + s[group] // 64 * 16


def q2_k(b: bytes, i: int) -> float:
    half, j = divmod(i, 128)
    code = b[16 + 32 * half + j % 32] >> 2 * (j // 32) & 3
    return 0.5 * (b[i // 16] % 16) * code - 0.25 * (b[i // 16] // 16)


def q3_k(b: bytes, i: int) -> float:
    half, j = divmod(i, 128)
    code = b[32 + 32 * half + j % 32] >> 2 * (j // 32) & 3
    code -= 0 if b[i % 32] >> i // 32 & 1 else 4
    scales, group = b[96:108], i // 16
    low = scales[group] % 16 if group < 8 else scales[group - 8] // 16
    high = scales[8 + group % 4] >> 2 * (group // 4) & 3
    return 0.5 * (low + 16 * high - 32) * code


def q4_k(b: bytes, i: int) -> float:
    scale, minimum = six_bit(b[4:16], i // 32)
    code = b[16 + 32 * (i // 64) + i % 32] >> 4 * (i // 32 % 2) & 15
    return 0.5 * scale * code - 0.25 * minimum


def q5_k(b: bytes, i: int) -> float:
    scale, minimum = six_bit(b[4:16], i // 32)
    code = b[48 + 32 * (i // 64) + i % 32] >> 4 * (i // 32 % 2) & 15
    code += 16 * (b[16 + i % 32] >> i // 32 & 1)
    return 0.5 * scale * code - 0.25 * minimum


def q6_k(b: bytes, i: int) -> float:
    half, j = divmod(i, 128)
    code = b[64 * half + j % 64] >> 4 * (j // 64) & 15
    code += 16 * (b[128 + 32 * half + j % 32] >> 2 * (j // 32) & 3)
    return 0.5 * struct.unpack("b", b[192 + i // 16 : 193 + i // 16])[0] * (code - 32)


IQ4 = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]


def iq4_nl(b: bytes, i: int) -> float:
    return 0.5 * IQ4[b[2 + i % 16] >> 4 * (i // 16) & 15]


def iq4_xs(b: bytes, i: int) -> float:
    group = i // 32
    low = b[4 + group // 2] >> 4 * (group % 2) & 15
    high = (b[2] + 256 * b[3]) >> 2 * group & 3
    return 0.5 * (low + 16 * high - 32) * IQ4[b[8 + 16 * group + i % 16] >> 4 * (i % 32 // 16) & 15]


BY_HAND: dict[str, Callable[[bytes, int], float]] = {
    "Q2_K": q2_k,
    "Q3_K": q3_k,
    "Q4_K": q4_k,
    "Q5_K": q5_k,
    "Q6_K": q6_k,
    "IQ4_NL": iq4_nl,
    "IQ4_XS": iq4_xs,
}


@pytest.mark.parametrize("qtype", QTYPES)
def test_block_written_by_hand(qtype: str) -> None:
    fmt = ops.FORMATS[qtype]
    block = bytearray(filler(fmt.type_size))
    for at, value in zip(HALVES[qtype], (0.5, 0.25), strict=False):
        block[at : at + 2] = struct.pack("<e", value)
    got = ops.dequantize(torch.frombuffer(block, dtype=torch.uint8)[None], qtype)
    assert got.tolist() == [[BY_HAND[qtype](bytes(block), i) for i in range(fmt.block_size)]]


@pytest.mark.parametrize("qtype", QTYPES)
def test_products(qtype: str) -> None:
    blocks = blocks_of(qtype, 70, 512, seed=1, scales="small")
    weight = by_gguf(blocks, qtype)
    gen = torch.Generator().manual_seed(2)
    x, bias = torch.randn(3, 5, 512, generator=gen), torch.randn(70, generator=gen)
    want = F.linear(x, weight, bias)
    torch.testing.assert_close(ops.linear(x, blocks, qtype, bias), want, rtol=1e-4, atol=1e-4)
    value, gate = want.chunk(2, -1)
    torch.testing.assert_close(ops.linear_geglu(x, blocks, qtype, bias), value * F.gelu(gate), rtol=1e-4, atol=1e-4)

    taps = blocks_of(qtype, 24, 9 * 256, seed=3, scales="small")  # rows in (in, kh, kw) order, as other tools write
    image = torch.randn(2, 256, 5, 4, generator=gen)
    want = F.conv2d(image, by_gguf(taps, qtype).view(24, 256, 3, 3), padding=1)
    got = ops.conv2d(image, taps, qtype, (24, 256, 3, 3), padding=1, tap_major=False)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


class Seen(TorchDispatchMode):
    """Keeps the tensors that operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        results = result if isinstance(result, list | tuple) else [result]
        self.tensors += [t for t in results if isinstance(t, Tensor)]
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("qtype", QTYPES)
def test_intermediates_are_no_larger_than_a_chunk_in_float32(
    qtype: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "CHUNK_VALUES", 1 << 14)
    blocks = blocks_of(qtype, 64, 8192, seed=6)
    out = torch.empty(64, 8192, dtype=dtype)
    with Seen() as seen:
        ops.dequantize(blocks, qtype, dtype, out)
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in seen.tensors}
    for tensor in (blocks, out):
        sizes.pop(tensor.untyped_storage().data_ptr())
    assert 0 < max(sizes.values()) <= 4 * (1 << 14)


@pytest.mark.parametrize("qtype", QTYPES)
def test_everything_is_on_the_blocks_device_and_nothing_waits_for_it(qtype: str) -> None:
    """Tensors of the meta device hold no data: reading one on the host raises."""
    blocks = blocks_of(qtype, 4, 768, seed=7).to("meta")
    ops.dequantize(blocks, qtype)
    with Seen() as seen:
        decoded = ops.dequantize(blocks, qtype, torch.float16)
    assert decoded.shape == (4, 768)
    assert {t.device.type for t in seen.tensors} == {"meta"}


@pytest.mark.parametrize("qtype", QTYPES)
def test_constants_reach_a_device_once(qtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA graph cannot capture a copy from the host."""
    blocks = blocks_of(qtype, 4, 768, seed=8)
    first = ops.dequantize(blocks, qtype)

    def refuse(*args: Any, **kwargs: Any) -> Tensor:
        raise AssertionError("a tensor is made from host data")

    for name in ("tensor", "as_tensor", "from_numpy"):
        monkeypatch.setattr(torch, name, refuse)
    assert torch.equal(ops.dequantize(blocks, qtype), first)
