"""Products in 8 bits on a CPU against float64, and what they do with odd values."""

from __future__ import annotations

import math

import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from torch import Tensor
from torch.nn import functional as F

from gguf_sd_kernels.cpu import int8

pytestmark = pytest.mark.skipif(not int8.is_fast(), reason="this processor has no instructions for products in 8 bits")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative_error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (7, 33), (2, 5, 6, 7), (3, int8.CHUNK_VALUES // 2 + 1)])
def test_activations(shape: tuple[int, ...], dtype: torch.dtype, silu: bool) -> None:
    """Every value is within half a step of what it stands for, whatever the layout."""
    x = (3 * random(*shape) + 1).to(dtype)
    if len(shape) == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    values, scale, zero, _ = int8.quantize(x, silu)
    want = F.silu(x.float()) if silu else x.float()
    assert values.shape == x.shape
    assert values.stride() == x.stride()
    error = scale * (values.float() - zero) - want
    of_silu = 1e-4 * want.abs() if silu and dtype == torch.bfloat16 else 0  # to which kernels in C++ compute it
    assert (error.abs() - of_silu).max() <= 0.5001 * scale + 1e-6
    span = max(float(want.max()), 0.0) - min(float(want.min()), 0.0)
    assert scale <= 1.1 * span / 255 + 1e-3 * silu


def test_activations_that_say_little() -> None:
    zeros = int8.quantize(torch.zeros(4, 8))
    assert not (zeros.values.float() - zeros.zero).any()
    assert math.isfinite(zeros.scale)
    empty = int8.quantize(torch.zeros(0, 8))
    assert empty.values.shape == (0, 8)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("silu", [False, True])
def test_what_is_not_finite_stays_so(value: float, silu: bool) -> None:
    x = random(4, 32)
    x[2, 5] = value
    if silu and value == -math.inf:
        pytest.skip("SiLU of minus infinity is no number in torch, and zero in the limit")
    weight = int8.LinearWeight(int8.Codes.of(random(8, 32, seed=1)))
    assert not int8.linear(int8.quantize(x, silu), weight, None, torch.float32).isfinite().any()


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "Q6_K"])
def test_weights_of_blocks(kind: str) -> None:
    """Codes are the nearest to what gguf-py decodes, each row over its own range; a row of zeros stays one."""
    weight = random(6, 1024)
    weight[3] = 0
    qtype = GGMLQuantizationType[kind]
    if kind == "Q6_K":
        blocks = torch.randint(0, 256, (6, 4 * 210), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        blocks.view(6, 4, 210)[..., 208:] = torch.tensor([0, 0x2C], dtype=torch.uint8)  # scales of 1/16
    else:
        blocks = torch.from_numpy(quantize(weight.numpy(), qtype))
    decoded = torch.from_numpy(dequantize(blocks.numpy(), qtype))
    codes = int8.Codes.of_blocks(blocks, kind, (6, 1024))
    assert (codes.scales[:, None] * codes.values - decoded).abs().max() <= 0.5001 * codes.scales.max()
    assert (codes.values.abs().amax(1) == torch.where(decoded.abs().amax(1) > 0, 127, 0)).all()
    whole = int8.Codes.of(decoded)
    assert torch.equal(whole.values, codes.values)
    assert torch.equal(whole.scales, codes.scales)


@pytest.mark.parametrize("tap_major", [True, False])
def test_convolutions_of_blocks(tap_major: bool) -> None:
    weight = random(5, 32, 3, 3)
    rows = (weight.permute(0, 2, 3, 1) if tap_major else weight).reshape(5, -1)
    blocks = torch.from_numpy(quantize(rows.contiguous().numpy(), GGMLQuantizationType.Q8_0))
    codes = int8.Codes.of_blocks(blocks, "Q8_0", (5, 32, 3, 3), tap_major=tap_major)
    assert relative_error(codes.scales[:, None, None, None] * codes.values, weight) < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "out"), [((1, 8), 3), ((2, 77, 320), 640), ((300, 33), 17)])
def test_linear(shape: tuple[int, ...], out: int, dtype: torch.dtype) -> None:
    """Exact up to the rounding of the result, as a product of the integers."""
    x, weight = int8.quantize(random(*shape).to(dtype)), int8.Codes.of(random(out, shape[-1], seed=1))
    bias, residual = random(out, seed=2), random(*shape[:-1], out, seed=3).to(dtype)
    own = x.scale * (x.values.double() - x.zero) @ (weight.scales[:, None].double() * weight.values).T + bias
    packed = int8.LinearWeight(weight)
    limit = 1e-5 if dtype == torch.float32 else 4e-3
    assert relative_error(int8.linear(x, packed, bias, dtype), own) < limit
    assert relative_error(int8.linear(x, packed, bias, dtype, gelu=True), F.gelu(own)) < limit
    assert relative_error(int8.linear(x, packed, None, dtype, residual), own - bias + residual) < limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("stride", "kernel"), [(1, 3), (2, 3), (1, 1)])
def test_convolution(stride: int, kernel: int, dtype: torch.dtype) -> None:
    """Exact as well, with a zero point other than the middle around the padding."""
    picture = (random(2, 20, 9, 11) + 1).to(dtype).contiguous(memory_format=torch.channels_last)
    x, weight, bias = (
        int8.quantize(picture, silu=True),
        int8.Codes.of(random(24, 20, kernel, kernel, seed=1)),
        random(24),
    )
    assert x.zero < 40
    values = x.scale * (x.values.double() - x.zero)
    want = F.conv2d(
        values, weight.scales[:, None, None, None].double() * weight.values, bias.double(), stride, kernel // 2
    )
    got = int8.convolve(x, int8.ConvWeight(weight, stride, kernel // 2), bias, dtype)
    assert got.dtype == dtype
    assert relative_error(got, want) < (1e-5 if dtype == torch.float32 else 4e-3)


def test_convolution_of_maps_of_several_sizes() -> None:
    """A weight is put in the order for the first map, and right for all."""
    weight = int8.Codes.of(random(24, 20, 3, 3, seed=1))
    kept = int8.ConvWeight(weight, stride=1, padding=1)
    for size in ((9, 11), (64, 64), (1, 1), (9, 11)):
        x = int8.quantize(random(2, 20, *size).contiguous(memory_format=torch.channels_last))
        values = x.scale * (x.values.double() - x.zero)
        want = F.conv2d(values, weight.scales[:, None, None, None].double() * weight.values, padding=1)
        assert relative_error(int8.convolve(x, kept, None, torch.float32), want) < 1e-5
