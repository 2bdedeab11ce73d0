"""Products in 8 bits: exact for the quantised activations, and close for the true ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gguf_sd_kernels.int8 import INT8_TYPES, LARGE_M, SMALL_M, linear_int8, quantize_activations
from gguf_sd_kernels.repack import repack


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks of 32 by their largest magnitude: codes as float64 [M, K/32, 32], and the values they stand for."""
    blocks = x.double().view(len(x), -1, 32)
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    codes = (blocks / scale.clamp(min=1e-30)).round()
    return codes, (codes * scale).view(x.shape)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_activations(dtype: torch.dtype, material: Any) -> None:
    x = material.normal(9, 160, seed=1, dtype=dtype)
    x[3, 32:64] = 0
    codes, values = quantised(x)
    got = quantize_activations(x)
    off = (got.codes.view(9, -1, 32).double() - codes).abs()
    assert off.max() <= 1
    assert (off > 0).double().mean() < 0.01  # ties, decided in float32
    assert torch.equal(got.sums, got.codes.view(9, -1, 32).int().sum(-1, dtype=torch.int32))
    assert (got.codes.view(9, -1, 32) * got.scales[..., None]).view(x.shape).double().sub(values).abs().max() < 0.03


@pytest.mark.parametrize("qtype", INT8_TYPES)
@pytest.mark.parametrize("geglu", [False, True])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("m", [1, 35])
def test_linear(qtype: str, geglu: bool, splits: int, m: int, material: Any) -> None:
    blocks, weight = material.weight(qtype, 70, 160, seed=2)
    x, bias = material.normal(m, 160, seed=3), material.normal(70, seed=4)
    residual = None if geglu else material.normal(m, 70, seed=5)
    packed = repack(blocks, qtype)
    got = linear_int8(x, packed, bias, residual, geglu=geglu, launch=replace(SMALL_M, splits=splits))
    for activations, limit in ((quantised(x)[1], 2e-3), (x, 2e-2)):
        want = F.linear(activations.double(), weight, bias.double())
        if residual is None:
            value, gate = want.chunk(2, dim=-1)
            want = value * F.gelu(gate)
        else:
            want = want + residual
        assert material.error(got, want) < limit


@pytest.mark.parametrize("qtype", INT8_TYPES)
def test_extreme_codes_do_not_overflow(qtype: str, material: Any, device: torch.device) -> None:
    """The largest sums a block can have, of both signs, come out exactly."""
    blocks, _ = material.weight(qtype, 32, 64, seed=6)
    packed = repack(blocks, qtype)
    packed.quants[:16], packed.quants[16:] = 0, 0xFF
    packed.scales.fill_(2.0**-10)
    low, high = (-128, 127) if qtype == "Q8_0" else (-8, 7)
    got = linear_int8(torch.ones(3, 64, dtype=torch.float16, device=device), packed, launch=LARGE_M)
    assert torch.equal(got[:, :16], torch.full_like(got[:, :16], low * 64 / 1024))
    assert torch.equal(got[:, 16:], torch.full_like(got[:, 16:], high * 64 / 1024))


def test_errors_give_the_values(material: Any) -> None:
    x, weight = material.normal(2, 64, seed=7), repack(material.weight("Q4_1", 4, 64, seed=8)[0], "Q4_1")
    with pytest.raises(ValueError, match="Q4_0 and Q8_0 weights, got Q4_1"):
        linear_int8(x, weight)
    with pytest.raises(ValueError, match=r"torch\.float32"):
        quantize_activations(x.float())
