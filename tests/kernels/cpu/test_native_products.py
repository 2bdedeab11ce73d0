"""Products of bytes in tiles, against float64 on the values that codes stand for."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gguf_sd_kernels.cpu import enlarged, int8, native

pytestmark = pytest.mark.skipif(
    not native.multiplies(32, 64, torch.bfloat16), reason="no tiles of bytes here, or no compiler"
)
ROUNDED = 6e-3  # bfloat16's, and what the SiLU and the GELU in vectors leave


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def codes(*shape: int, seed: int = 1) -> native.Coded:
    values = torch.randint(256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return native.Coded(values, 0.02, 93)


def real(x: native.Coded | int8.Activation) -> Tensor:
    return x.scale * (x.values.double() - x.zero)


def weight_of(codes: int8.Codes) -> Tensor:
    return codes.values.double() * codes.scales.double().view(-1, *[1] * (codes.values.dim() - 1))


def close(got: Tensor, want: Tensor) -> None:
    assert got.dtype == torch.bfloat16
    assert got.shape == want.shape
    assert (got.double() - want).norm() < ROUNDED * want.norm()
    assert (got.double() - want).abs().max() < 2 * ROUNDED * want.abs().max()


@pytest.mark.parametrize("rows", [1, 31, 32, 33, 200])
@pytest.mark.parametrize(("depth", "columns"), [(64, 32), (320, 96), (192, 320)])
@pytest.mark.usefixtures("threads")
def test_linear(rows: int, depth: int, columns: int) -> None:
    x, weight, bias = codes(rows, depth), int8.Codes.of(random(columns, depth)), random(columns, seed=2)
    residual = random(rows, columns, seed=3).bfloat16()
    packed, want = native.pack(weight.values), real(x) @ weight_of(weight).t()
    close(native.linear(x, packed, weight.scales, None), want)
    close(native.linear(x, packed, weight.scales, bias), want + bias)
    close(native.linear(x, packed, weight.scales, bias, residual), want + bias + residual)
    close(native.linear(x, packed, weight.scales, bias, after=native.GELU), F.gelu(want + bias))


def test_sums_hold_the_largest_values() -> None:
    """Sums of 23,040 products, as the deepest convolution's, stay exact in int32."""
    depth = 23040
    x = native.Coded(torch.full((1, depth), 255, dtype=torch.uint8), 1.0, 0)
    packed = native.pack(torch.full((32, depth), -127, dtype=torch.int8))
    close(native.linear(x, packed, torch.ones(32), None), torch.full((1, 32), -127.0 * 255 * depth).double())


@pytest.mark.parametrize("x", [-8.0, -3.0, -1.0, -0.1, 0.0, 0.1, 1.0, 3.0, 8.0, 30.0])
def test_gelu(x: float) -> None:
    one = native.Coded(torch.ones(1, 64, dtype=torch.uint8), 0.0, 0)  # a product of nothing, and the bias
    got = native.linear(one, native.pack(torch.ones(32, 64, dtype=torch.int8)), torch.ones(32), torch.full((32,), x),
                        after=native.GELU)  # fmt: skip
    want = F.gelu(torch.tensor(x, dtype=torch.float64))
    torch.testing.assert_close(got.double(), want.expand(1, 32), rtol=4e-3, atol=2e-4)


@pytest.mark.parametrize("bias", [True, False])
def test_a_gated_weight(bias: bool) -> None:
    x = int8.Activation(*codes(2, 45, 128))
    weight, added = int8.Codes.of(random(192, 128)), random(192, seed=2) if bias else None
    want = real(x) @ weight_of(weight).t() + (0 if added is None else added)
    value, gate = want.chunk(2, dim=-1)
    gated = int8.GatedWeight(weight, added)
    close(int8.linear_geglu(x, gated, torch.bfloat16), value * F.gelu(gate))
    close(int8.linear_halves(x, gated, torch.bfloat16), want)
    assert gated.nbytes == 192 * 128 + 2 * 4 * 192


@pytest.mark.parametrize(("height", "width"), [(8, 8), (5, 17), (1, 1), (16, 40)])
@pytest.mark.usefixtures("threads")
def test_convolve(height: int, width: int) -> None:
    x = int8.Activation(codes(1, height, width, 64).values.permute(0, 3, 1, 2), 0.02, 93)
    weight, bias = int8.Codes.of(random(96, 64, 3, 3)), random(96, seed=2)
    residual = random(1, height, width, 96, seed=3).bfloat16().permute(0, 3, 1, 2)
    want = F.conv2d(real(x), weight_of(weight), bias.double(), padding=1)
    conv = int8.ConvWeight(weight, 1, 1)
    assert conv.tiles(torch.bfloat16) is not None
    close(int8.convolve(x, conv, bias, torch.bfloat16), want)
    close(int8.convolve(x, conv, bias, torch.bfloat16, residual), want + residual)
    got = int8.convolve(x, conv, bias, torch.bfloat16)
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_what_is_written_with_a_margin_is_convolved_as_it_is() -> None:
    x = random(1, 64, 12, 10).bfloat16().contiguous(memory_format=torch.channels_last)
    conv = int8.ConvWeight(int8.Codes.of(random(32, 64, 3, 3)), 1, 1)
    norm = 8, 1 + random(64, seed=4), random(64, seed=5), 1e-5
    for silu, margin in product([True, False], repeat=2):
        pairs = int8.quantize(x, silu, margin), int8.quantize(x, silu)
        normed = int8.quantize_group_norm(x, *norm, silu, margin), int8.quantize_group_norm(x, *norm, silu)
        for with_margin, without in (pairs, normed):
            assert (with_margin.margin, without.margin) == (margin, False)
            assert torch.equal(with_margin.values, without.values)
            got, want = (int8.convolve(codes, conv, None, torch.bfloat16) for codes in (with_margin, without))
            assert torch.equal(got, want)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (3, 17)])
def test_a_map_enlarged(height: int, width: int) -> None:
    x = int8.Activation(codes(1, height, width, 64).values.permute(0, 3, 1, 2), 0.02, 93)
    weight, bias = random(32, 64, 3, 3), random(32, seed=2)
    phases = [int8.ConvWeight(int8.Codes.of(phase), 1, 1) for phase in enlarged.phase_weights(weight)]
    got = int8.convolve_enlarged(x, phases, bias, torch.bfloat16)
    want = F.conv2d(F.interpolate(real(x), scale_factor=2), weight.double(), bias.double(), padding=1)
    assert got.shape == want.shape
    assert (got.double() - want).norm() < 1e-2 * want.norm()  # of the weights' own 8 bits


def test_what_is_not_finite_is_not_hidden() -> None:
    x = native.Coded(torch.zeros(40, 64, dtype=torch.uint8), float("nan"), 0)
    packed = native.pack(torch.ones(32, 64, dtype=torch.int8))
    assert native.linear(x, packed, torch.ones(32), torch.ones(32)).isnan().all()
    assert native.linear(x, packed, torch.ones(32), torch.ones(32), after=native.GELU).isnan().all()


@pytest.mark.parametrize(
    ("columns", "depth", "dtype"), [(40, 64, torch.bfloat16), (32, 96, torch.bfloat16), (32, 64, torch.float32)]
)
def test_what_does_not_fit_is_onednns(columns: int, depth: int, dtype: torch.dtype) -> None:
    weight, x = int8.Codes.of(random(columns, depth)), codes(5, depth)
    linear = int8.LinearWeight(weight)
    assert linear.tiles(dtype) is None
    got = int8.linear(int8.Activation(*x), linear, None, dtype)
    assert got.dtype == dtype
    want = real(x) @ weight_of(weight).t()
    assert (got.double() - want).norm() < ROUNDED * want.norm()


def test_both_ways_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the last bit of a few results: sums are exact in both."""
    x, residual = int8.Activation(*codes(77, 320)), random(77, 64, seed=3).bfloat16()
    weight, bias = int8.Codes.of(random(64, 320)), random(64, seed=2)
    tiles = int8.linear(x, int8.LinearWeight(weight), bias, torch.bfloat16, residual)
    monkeypatch.setattr(native, "multiplies", lambda *_: False)
    plain = int8.linear(x, int8.LinearWeight(weight), bias, torch.bfloat16, residual)
    torch.testing.assert_close(tiles, plain, rtol=2**-7, atol=1e-3)
    assert (tiles != plain).float().mean() < 0.05
