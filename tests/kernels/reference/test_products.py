"""The plain-torch path against gguf-py's decoder and against float64 products."""

from __future__ import annotations

import struct

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gguf_sd_kernels import ops
from gguf_sd_kernels.cpu import conv, scratch
from gguf_sd_kernels.formats import block_format
from gguf_sd_kernels.reference import products
from gguf_sd_kernels.reference.products import conv_weight

QTYPES = [name for name, fmt in ops.FORMATS.items() if isinstance(fmt, ops.BlockFormat)]  # test_decoders.py: others
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Relative error of a product: weights rounded once, accumulated in float32, results rounded once.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def random_blocks(qtype: str, rows: int, cols: int, seed: int) -> Tensor:
    """Blocks of random bits, with scales and minima that are any finite float16."""
    rng = np.random.default_rng(seed)
    fmt = block_format(qtype)
    blocks = rng.integers(0, 256, (rows * cols // fmt.block_size, fmt.type_size), dtype=np.uint8)
    halves = (fmt.scale_bytes + fmt.min_bytes) // 2
    scales = rng.integers(0, 0x7C00, (len(blocks), halves), dtype=np.uint16)
    scales |= rng.integers(0, 2, scales.shape, dtype=np.uint16) << 15
    blocks[:, : 2 * halves] = scales.view(np.uint8)
    return torch.from_numpy(blocks.reshape(rows, -1))


def quantized(qtype: str, rows: int, cols: int, seed: int) -> tuple[Tensor, Tensor]:
    """Gaussian weights quantised by gguf-py: the blocks, and what gguf-py decodes from them in float64."""
    weights = np.random.default_rng(seed).standard_normal((rows, cols), dtype=np.float32) * 0.05
    kind = gguf.GGMLQuantizationType[qtype]
    blocks = gguf.quants.quantize(weights, kind)
    return torch.from_numpy(blocks), torch.from_numpy(gguf.quants.dequantize(blocks, kind)).double()


def assert_close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == dtype
    assert got.shape == want.shape
    error = (got.double() - want).norm() / want.norm()
    assert error < TOLERANCE[dtype], f"relative error {error:.2e}"


@pytest.mark.parametrize("qtype", QTYPES)
def test_format_is_ggmls(qtype: str) -> None:
    kind = gguf.GGMLQuantizationType[qtype]
    fmt = ops.FORMATS[qtype]
    assert (fmt.block_size, fmt.type_size) == gguf.GGML_QUANT_SIZES[kind]
    assert fmt.ggml_type == kind
    assert ops.row_bytes(qtype, 96) == 3 * fmt.type_size
    assert ops.row_values(qtype, 3 * fmt.type_size) == 96


@pytest.mark.parametrize("qtype", QTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "cols"), [(1, 32), (7, 96), (129, 2080), (530, 2080)])
def test_dequantize_is_gguf_rounded_once(qtype: str, dtype: torch.dtype, rows: int, cols: int) -> None:
    blocks = random_blocks(qtype, rows, cols, seed=rows)
    want = torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[qtype])).to(dtype)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(ops.dequantize(blocks, qtype, dtype).view(bits), want.view(bits))
    out = torch.full((rows, cols), float("nan"), dtype=dtype)
    assert ops.dequantize(blocks, qtype, dtype, out) is out
    assert torch.equal(out.view(bits), want.view(bits))


@pytest.mark.parametrize("qtype", QTYPES)
def test_dequantize_of_quantized_weights(qtype: str) -> None:
    blocks, want = quantized(qtype, 24, 640, seed=5)
    assert torch.equal(ops.dequantize(blocks, qtype).double(), want)


NIBBLES = bytes(range(0x10, 0x100, 0x0F))  # 0x10 0x1F 0x2E … 0xF1: low 0 15 14 … 1, high 1 1 2 … 15
LOW = [b & 15 for b in NIBBLES]
HIGH = [b >> 4 for b in NIBBLES]
FIFTH = 0x8000_0001  # the first and the last value have their fifth bit set
BY_HAND = {
    "Q4_0": (struct.pack("<e", 0.5) + NIBBLES, [0.5 * (n - 8) for n in LOW + HIGH]),
    "Q4_1": (struct.pack("<ee", 0.5, -3.0) + NIBBLES, [0.5 * n - 3 for n in LOW + HIGH]),
    "Q5_0": (
        struct.pack("<eI", -2.0, FIFTH) + NIBBLES,
        [-2.0 * (n + 16 * (i in (0, 31)) - 16) for i, n in enumerate(LOW + HIGH)],
    ),
    "Q5_1": (
        struct.pack("<eeI", 0.25, 1.5, FIFTH) + NIBBLES,
        [0.25 * (n + 16 * (i in (0, 31))) + 1.5 for i, n in enumerate(LOW + HIGH)],
    ),
    "Q8_0": (struct.pack("<e32b", 0.125, *range(-128, 0, 4)), [0.125 * q for q in range(-128, 0, 4)]),
}


@pytest.mark.parametrize("qtype", QTYPES)
def test_block_written_by_hand(qtype: str) -> None:
    block, want = BY_HAND[qtype]
    got = ops.dequantize(torch.frombuffer(bytearray(block), dtype=torch.uint8)[None], qtype)
    assert got.tolist() == [want]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("qtype", QTYPES)
def test_linear(qtype: str, dtype: torch.dtype) -> None:
    blocks, weight = quantized(qtype, 70, 160, seed=1)
    gen = torch.Generator().manual_seed(2)
    x, bias = torch.randn(3, 5, 160, generator=gen).to(dtype), torch.randn(70, generator=gen)
    assert_close(ops.linear(x, blocks, qtype, bias), F.linear(x.double(), weight, bias.double()), dtype)
    assert_close(ops.linear(x, blocks, qtype), F.linear(x.double(), weight), dtype)
    value, gate = F.linear(x.double(), weight, bias.double()).chunk(2, -1)
    assert_close(ops.linear_geglu(x, blocks, qtype, bias), value * F.gelu(gate), dtype)


CONVS = [  # (OC, IC, KH, KW), (H, W), stride, padding
    ((40, 32, 3, 3), (9, 7), 1, 1),
    ((40, 32, 3, 3), (9, 7), 2, 1),
    ((33, 64, 3, 3), (8, 11), 1, 0),
    ((33, 64, 3, 3), (8, 11), 2, 0),
    ((17, 96, 1, 1), (5, 3), 1, 0),
    ((17, 96, 1, 1), (5, 3), 2, 0),
    ((17, 96, 1, 1), (5, 3), 1, 1),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "size", "stride", "padding"), CONVS)
@pytest.mark.parametrize("tap_major", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
def test_conv2d(
    shape: tuple[int, int, int, int],
    size: tuple[int, int],
    stride: int,
    padding: int,
    tap_major: bool,
    channels_last: bool,
    dtype: torch.dtype,
) -> None:
    oc, ic, kh, kw = shape
    blocks, flat = quantized("Q4_1", oc, ic * kh * kw, seed=3)
    weight = flat.view(oc, kh, kw, ic).permute(0, 3, 1, 2) if tap_major else flat.view(oc, ic, kh, kw)
    gen = torch.Generator().manual_seed(4)
    x, bias = torch.randn(2, ic, *size, generator=gen).to(dtype), torch.randn(oc, generator=gen)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    want = F.conv2d(x.double(), weight, bias.double(), stride, padding)
    got = ops.conv2d(x, blocks, "Q4_1", shape, bias, stride, padding, tap_major=tap_major)
    assert_close(got, want, dtype)


def test_tap_major_weight_is_a_channels_last_view() -> None:
    blocks, flat = quantized("Q8_0", 8, 9 * 32, seed=6)
    weight = conv_weight(blocks, "Q8_0", (8, 32, 3, 3), torch.float32, tap_major=True)
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(weight[:, :, 2, 1].double(), flat.view(8, 3, 3, 32)[:, 2, 1])


def test_errors_give_the_values() -> None:
    blocks, _ = quantized("Q4_0", 4, 64, seed=7)
    x = torch.randn(2, 64)
    with pytest.raises(ValueError, match=r"'Q9_9'.*Q4_0"):
        ops.row_bytes("Q9_9", 32)
    with pytest.raises(ValueError, match="multiple of 32 values, got 33"):
        ops.row_bytes("Q4_0", 33)
    with pytest.raises(ValueError, match="35 bytes"):
        ops.dequantize(blocks[:, :35], "Q4_0")
    with pytest.raises(ValueError, match=r"torch\.int8"):
        ops.dequantize(blocks.view(torch.int8), "Q4_0")
    with pytest.raises(ValueError, match=r"\(4, 64\).*\(4, 32\)"):
        ops.dequantize(blocks, "Q4_0", out=torch.empty(4, 32))
    with pytest.raises(ValueError, match=r"\(2, 63\).*64 inputs"):
        ops.linear(x[:, 1:], blocks, "Q4_0")
    with pytest.raises(ValueError, match="even number of outputs, got 3"):
        ops.linear_geglu(x, blocks[:3], "Q4_0")
    with pytest.raises(ValueError, match=r"\[4\], got \[5\]"):
        ops.linear(x, blocks, "Q4_0", torch.zeros(5))
    with pytest.raises(ValueError, match=r"\[B, 32, H, W\]"):
        ops.conv2d(torch.randn(2, 64, 3, 3), blocks, "Q4_0", (4, 32, 1, 2), tap_major=True)
    with pytest.raises(ValueError, match=r"\[4, 54\], got \[4, 36\]"):
        ops.conv2d(torch.randn(2, 32, 3, 3), blocks, "Q4_0", (4, 32, 1, 3), tap_major=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_decoded_in_parts(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit what whole ones give, and in a buffer that holds no more than a part."""
    monkeypatch.setattr(products, "PART_VALUES", 64 * 96)
    monkeypatch.setattr(conv, "MIN_WEIGHTS", 0)
    blocks, _ = quantized("Q4_0", 200, 96, 1)
    taps, _ = quantized("Q4_0", 200, 9 * 32, 2)
    x, bias = torch.randn(5, 96, dtype=dtype), torch.randn(200)
    picture = torch.randn(2, 32, 6, 7, dtype=dtype)

    def results() -> tuple[Tensor, ...]:
        scratch.release()
        return (
            ops.linear(x, blocks, "Q4_0", bias),
            ops.linear_geglu(x, blocks, "Q4_0", bias),
            ops.conv2d(picture, taps, "Q4_0", (200, 32, 3, 3), bias, padding=1, tap_major=True),
            ops.conv2d(picture, taps, "Q4_0", (200, 32, 3, 3), bias, padding=1, tap_major=False),
        )

    whole, largest = results(), scratch._store.buffer.numel()  # type: ignore[union-attr]
    scratch.decode_in_parts(True)
    try:
        parts, part = results(), scratch._store.buffer.numel()  # type: ignore[union-attr]
    finally:
        scratch.decode_in_parts(False)
    assert all(map(torch.equal, whole, parts))
    assert (largest, part) == (200 * 9 * 32 * dtype.itemsize, 64 * 9 * 32 * dtype.itemsize)
