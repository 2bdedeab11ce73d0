"""Products in 8 bits: exact for the quantised activations, and close for the true ones."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gguf_sd_kernels.devices import FAMILIES, Gpu
from gguf_sd_kernels.repack import PackedWeight, repack
from gguf_sd_kernels.triton import int8
from gguf_sd_kernels.triton.int8 import conv2d_int8, linear_int8
from gguf_sd_kernels.triton.quantize import Int8Activations, quantize_activations
from gguf_sd_kernels.tuning.launch import Launch, Prepared, Product
from gguf_sd_kernels.tuning.launch_int8 import INT8_TYPES, UNTUNED_INT8, choose_int8, int8_candidates, int8_supported

Shape = tuple[int, int, int, int]
SMALL = Launch(32, 32, 32, warps=4, stages=2)


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks of 32 by their largest magnitude: codes as float64 [M, K/32, 32], and the values they stand for."""
    blocks = x.double().view(len(x), -1, 32)
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    codes = (blocks / scale.clamp(min=1e-30)).round()
    return codes, (codes * scale).view(x.shape)


def quantised_channels(x: Tensor) -> Tensor:
    """What pictures [B, C, H, W] become by :func:`quantised`, 32 channels of a pixel at a time."""
    rows = x.permute(0, 2, 3, 1)
    return quantised(rows.reshape(-1, x.shape[1]))[1].view(rows.shape).permute(0, 3, 1, 2)


def conv_weight(material: Any, qtype: str, shape: Shape, seed: int) -> tuple[PackedWeight, Tensor]:
    """Tap-major blocks, packed, and the weight they stand for, float64 [OC, IC, KH, KW]."""
    oc, ic, kh, kw = shape
    blocks, flat = material.weight(qtype, oc, kh * kw * ic, seed)
    return repack(blocks, qtype, shape, tap_major=True), flat.view(oc, kh, kw, ic).permute(0, 3, 1, 2)


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
    got = linear_int8(x, packed, bias, residual, geglu=geglu, launch=replace(SMALL, splits=splits))
    for activations, limit in ((quantised(x)[1], 2e-3), (x, 2e-2)):
        want = F.linear(activations.double(), weight, bias.double())
        if residual is None:
            value, gate = want.chunk(2, dim=-1)
            want = value * F.gelu(gate)
        else:
            want = want + residual
        assert material.error(got, want) < limit


CASES = [  # weight, batch, picture, stride, padding
    ((33, 64, 3, 3), 2, (7, 5), 1, 1),
    ((33, 64, 3, 3), 1, (7, 5), 2, 1),
    ((40, 96, 3, 3), 2, (6, 9), 2, 0),
    ((40, 32, 3, 3), 1, (1, 1), 1, 1),  # eight of nine taps lie outside
    ((17, 96, 1, 1), 2, (5, 3), 1, 0),
    ((17, 96, 1, 1), 1, (5, 3), 2, 0),
    ((17, 64, 3, 2), 1, (5, 4), 1, 1),
]


@pytest.mark.parametrize("qtype", INT8_TYPES)
@pytest.mark.parametrize(("shape", "batch", "size", "stride", "padding"), CASES)
def test_conv(
    qtype: str, shape: Shape, batch: int, size: tuple[int, int], stride: int, padding: int, material: Any
) -> None:
    """The blocks of x differ in scale and in sum, so that each has to be found in its place."""
    weight, full = conv_weight(material, qtype, shape, seed=6)
    x = material.normal(batch, shape[1], *size, seed=7) + 0.5
    x *= torch.linspace(0.2, 3.0, x[0].numel() // 32, device=x.device).repeat_interleave(32).view(x[:1].shape)
    bias, emb = material.normal(shape[0], seed=8), material.normal(batch, shape[0], seed=9)
    for activations, limit in ((quantised_channels(x), 2e-3), (x, 2e-2)):
        want = F.conv2d(activations.double(), full, bias.double(), stride, padding)
        got = conv2d_int8(x, weight, bias, stride, padding, launch=SMALL)
        assert got.is_contiguous(memory_format=torch.channels_last)
        assert material.error(got, want) < limit
        residual = material.normal(*want.shape, seed=10)
        chosen = replace(SMALL, splits=2)
        got = conv2d_int8(x, weight, bias, stride, padding, emb=emb, residual=residual, launch=chosen)
        assert material.error(got, want + emb.double()[:, :, None, None] + residual.double()) < limit


@pytest.mark.parametrize("qtype", INT8_TYPES)
def test_nothing_outside_the_picture_counts(qtype: str, material: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies in memory around the codes, scales and sums would make infinities and NaN."""

    def surrounded(tensor: Tensor, poison: float) -> Tensor:
        buffer = torch.full((3 * tensor.numel(),), poison, dtype=tensor.dtype, device=tensor.device)
        middle = buffer[tensor.numel() : 2 * tensor.numel()].view(tensor.shape)
        return middle.copy_(tensor)

    def poisoned(x: Tensor) -> Int8Activations:
        good = quantize_activations(x)
        nan_bits = (0x4B400000 - 0x7FC00000) // 8  # as a sum, which is taken from 0x4B400000 eight times
        return Int8Activations(
            surrounded(good.codes, 127), surrounded(good.scales, torch.inf), surrounded(good.sums, nan_bits)
        )

    weight, full = conv_weight(material, qtype, (32, 64, 3, 3), seed=11)
    x = material.normal(1, 64, 4, 3, seed=12)
    want = F.conv2d(quantised_channels(x), full, padding=1)
    monkeypatch.setattr(int8, "quantize_activations", poisoned)
    assert material.error(conv2d_int8(x, weight, padding=1, launch=SMALL), want) < 2e-3


@pytest.mark.parametrize("qtype", INT8_TYPES)
def test_extreme_codes_do_not_overflow(qtype: str, material: Any, device: torch.device) -> None:
    """The largest sums a block can have, of both signs, come out exactly."""
    blocks, _ = material.weight(qtype, 32, 9 * 32, seed=13)
    weight = repack(blocks, qtype, (32, 32, 3, 3), tap_major=True)
    weight.quants[:16], weight.quants[16:] = 0, 0xFF
    weight.scales.fill_(2.0**-10)
    low, high = (-128, 127) if qtype == "Q8_0" else (-8, 7)
    flat = replace(weight, shape=(32, 9 * 32), tap_major=False)
    for sign in (1, -1):
        ones = torch.full((3, 9 * 32), sign, dtype=torch.float16, device=device)
        want = torch.tensor([low] * 16 + [high] * 16, device=device) * sign * (9 * 32 / 1024)
        assert torch.equal(linear_int8(ones, flat, launch=SMALL), want.half().expand(3, -1))
        got = conv2d_int8(ones.view(3, 32, 3, 3), weight, launch=SMALL)
        assert torch.equal(got, want.half().view(1, 32, 1, 1).expand(3, -1, -1, -1))
    ones[:, ::2] = 1
    assert not linear_int8(ones, flat, launch=SMALL).any(), "the halves of a block cancel out"


@pytest.mark.parametrize("family", list(UNTUNED_INT8))
def test_every_launch_in_the_table(family: str, material: Any) -> None:
    weight, full = conv_weight(material, "Q4_0", (70, 32, 3, 3), seed=14)
    x = material.normal(1, 32, 9, 8, seed=15)
    want = F.conv2d(quantised_channels(x), full, padding=1)
    for _, launch in UNTUNED_INT8[family]:
        assert material.error(conv2d_int8(x, weight, padding=1, launch=launch), want) < 2e-3


def test_chosen_launch_in_bfloat16(material: Any, device: torch.device) -> None:
    channels, size = (1280, 17) if device.type == "cuda" else (32, 3)
    weight, full = conv_weight(material, "Q8_0", (channels, channels, 3, 3), seed=16)
    x = material.normal(2, channels, size, size, seed=17, dtype=torch.bfloat16)
    got = conv2d_int8(x, weight, padding=1)
    assert got.dtype == torch.bfloat16
    assert material.error(got, F.conv2d(quantised_channels(x), full, padding=1)) < 1e-2


def test_choice_and_candidates() -> None:
    """Every family has launches, of steps of a block; candidates hold the choice, K split for small grids alone."""
    assert set(FAMILIES.values()) | {"mfma", "wmma"} == set(UNTUNED_INT8)
    deep, wide = Product("linear", "Q4_0", 100, 320, 5120), Product("conv", "Q8_0", 8192, 2560, 2880, taps=9)
    one = replace(deep, m=1)
    for family in UNTUNED_INT8:
        for product in (one, deep, wide):
            found, chosen = int8_candidates(product, family, 80), choose_int8(product, Gpu("", family, 80))
            assert chosen in found
            assert all(launch.block_k == 32 for launch in found)
            assert (chosen.splits > 1) == (product is not wide)
    assert int8_candidates(deep, "no family", 80) == []
    with pytest.raises(ValueError, match="no products in 8 bits for this GPU"):
        choose_int8(deep, Gpu("", None, 80))


def test_supported_weights(material: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = {qtype: material.weight(qtype, 8, 9 * 32, seed=18)[0] for qtype in ("Q4_0", "Q4_1", "Q8_0")}
    taps = repack(blocks["Q8_0"], "Q8_0", (8, 32, 3, 3), tap_major=True)
    assert int8_supported(taps, device)
    assert int8_supported(repack(blocks["Q4_0"], "Q4_0"), device)
    assert int8_supported(repack(blocks["Q4_0"], "Q4_0", (8, 288, 1, 1)), device)
    assert not int8_supported(repack(blocks["Q4_1"], "Q4_1"), device)
    assert not int8_supported(replace(taps, tap_major=False), device)
    assert not int8_supported(repack(blocks["Q8_0"], "Q8_0", (8, 72, 2, 2), tap_major=True), device)
    monkeypatch.setattr("gguf_sd_kernels.tuning.launch_int8.gpu_family", lambda device: None)
    assert not int8_supported(taps, device)


def test_the_question_loads_no_triton() -> None:
    code = "import sys, gguf_sd_kernels.tuning.launch_int8; sys.exit('triton' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3] / "kernels")}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


def test_no_rows_no_result(material: Any) -> None:
    weight, _ = conv_weight(material, "Q8_0", (4, 32, 3, 3), seed=19)
    assert conv2d_int8(material.normal(0, 32, 5, 4, seed=20), weight, padding=1).shape == (0, 4, 5, 4)
    flat = replace(weight, shape=(4, 288))
    assert linear_int8(material.normal(2, 0, 288, seed=21), flat).shape == (2, 0, 4)


def test_errors_give_the_values(material: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = material.normal(2, 64, seed=22), repack(material.weight("Q4_1", 4, 64, seed=23)[0], "Q4_1")
    with pytest.raises(ValueError, match="Q4_0 and Q8_0 weights, got Q4_1"):
        linear_int8(x, weight)
    with pytest.raises(ValueError, match=r"torch\.float32"):
        quantize_activations(x.float())
    taps, _ = conv_weight(material, "Q4_0", (4, 32, 3, 3), seed=24)
    picture = material.normal(2, 32, 4, 4, seed=25)
    with pytest.raises(ValueError, match=r"\[4, 32, 3, 3\] is not tap-major"):
        conv2d_int8(picture, replace(taps, tap_major=False))
    with pytest.raises(ValueError, match=r"residual .*\[2, 4, 4, 4\], got \[2, 4, 4, 3\]"):
        conv2d_int8(picture, taps, padding=1, residual=material.normal(2, 4, 4, 3, seed=26))
    with pytest.raises(ValueError, match="a block of 32, got 64"):
        conv2d_int8(picture, taps, launch=replace(SMALL, block_k=64))
    monkeypatch.setattr(int8, "gpu_of", lambda device: Gpu("old", None, 1))
    Prepared.forget()
    with pytest.raises(ValueError, match="no products in 8 bits for this GPU"):
        conv2d_int8(picture, taps)
