"""Fused linears against float64 products of gguf-py's weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gguf_sd_kernels.devices import Gpu
from gguf_sd_kernels.repack import PACKED_TYPES, repack
from gguf_sd_kernels.triton.linear import linear_fused
from gguf_sd_kernels.triton.workspace import divide
from gguf_sd_kernels.tuning import launch as launches
from gguf_sd_kernels.tuning.launch import Launch, Measured, Product, best_splits, candidates, choose

# float16 by specification 2e-3; bfloat16 rounds weights and result to 8 bits: 2^-9 each, a quarter of it spare.
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2}
HOPPER, AMPERE = Gpu("hopper", "wgmma", 132), Gpu("ampere", "mma", 80)
SMALL = Launch(32, 64, 64, warps=4, stages=2)


def expected(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, geglu: bool) -> Tensor:
    y = F.linear(x.double(), weight, None if bias is None else bias.double())
    if geglu:
        value, gate = y.chunk(2, dim=-1)
        y = value * F.gelu(gate)
    return y if residual is None else y + residual.double()


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("geglu", [False, True])
@pytest.mark.parametrize("qtype", PACKED_TYPES)
def test_every_path(qtype: str, geglu: bool, splits: int, swap: bool, dtype: torch.dtype, material: Any) -> None:
    """Edges in M and N, all epilogues; 5 steps of K over 3 programs leave the last one shorter."""
    blocks, weight = material.weight(qtype, 140, 320, seed=1)
    x, bias = material.normal(2, 19, 320, seed=2, dtype=dtype), material.normal(140, seed=3, dtype=dtype)
    residual = None if geglu else material.normal(2, 19, 140, seed=4, dtype=dtype)
    chosen = replace(SMALL, swap=swap, splits=splits)
    got = linear_fused(x, repack(blocks, qtype), bias, residual, geglu=geglu, launch=chosen)
    assert got.dtype == dtype
    assert material.error(got, expected(x, weight, bias, residual, geglu)) < TOLERANCE[dtype]


@pytest.mark.parametrize("m", [1, 17, 77, 256, 1000])
@pytest.mark.parametrize("qtype", PACKED_TYPES)
def test_chosen_launch(qtype: str, m: int, material: Any, device: torch.device) -> None:
    """The launch that `choose` gives; real channel counts on a GPU, narrow ones in the interpreter."""
    n, k = (1280, 2048) if device.type == "cuda" else (96, 320 if m < 1000 else 64)
    blocks, weight = material.weight(qtype, n, k, seed=5)
    x, bias = material.normal(m, k, seed=6), material.normal(n, seed=7)
    packed = repack(blocks, qtype)
    assert material.error(linear_fused(x, packed, bias), expected(x, weight, bias, None, False)) < 2e-3


@pytest.mark.parametrize("family", list(launches.UNTUNED))
def test_every_launch_in_the_table(family: str, material: Any, device: torch.device) -> None:
    blocks, weight = material.weight("Q4_0", 160, 128, seed=8)
    x = material.normal(70, 128, seed=9)
    packed = repack(blocks, "Q4_0")
    for _, launch in launches.UNTUNED[family]:
        assert material.error(linear_fused(x, packed, launch=launch), F.linear(x.double(), weight)) < 2e-3


def test_split_k_leaves_counters_at_zero_and_repeats_itself(material: Any) -> None:
    blocks, _ = material.weight("Q8_0", 64, 256, seed=10)
    x, packed = material.normal(5, 256, seed=11), repack(blocks, "Q8_0")
    chosen = replace(SMALL, splits=4)
    first = linear_fused(x, packed, launch=chosen)
    assert all(torch.equal(linear_fused(x, packed, launch=chosen), first) for _ in range(3))


def test_division_among_programs(device: torch.device) -> None:
    """Three programs share 5 steps of K as 2, 2 and 1; there are no more programs than steps."""
    product = Product("linear", "Q8_0", 70, 100, 320)
    shared = divide(product, replace(SMALL, splits=3))
    assert (shared.grid, shared.steps, shared.split) == ((3 * 2, 3), 2, True)
    partials, counters = shared.shared(device)
    assert partials is not None
    assert partials.shape == (3 * 6 * SMALL.block_m * SMALL.block_n,)
    assert counters is not None
    assert not counters.any()
    assert divide(product, replace(SMALL, splits=9)).splits == 5
    whole = divide(product, SMALL)
    assert (whole.splits, whole.steps, whole.shared(device)) == (1, 5, (None, None))
    with pytest.raises(ValueError, match="at most 4096 tiles, got 6250"):
        divide(replace(product, m=100_000), replace(SMALL, splits=2))


def test_k_that_64_does_not_divide(material: Any) -> None:
    blocks, weight = material.weight("Q4_1", 40, 96, seed=12)
    x = material.normal(3, 96, seed=13)
    assert material.error(linear_fused(x, repack(blocks, "Q4_1")), F.linear(x.double(), weight)) < 2e-3


def test_one_block_at_a_time_with_distinct_values(material: Any, device: torch.device) -> None:
    """The identity as x shows each decoded value in its place."""
    blocks, weight = material.weight("Q4_0", 32, 64, seed=14)
    got = linear_fused(torch.eye(64, dtype=torch.float16, device=device), repack(blocks, "Q4_0"))
    assert torch.equal(got, weight.T.half())


def test_choice_of_launch() -> None:
    deep, wide = Product("linear", "Q4_0", 256, 1280, 5120), Product("linear", "Q4_0", 8192, 2560, 320)
    assert choose(deep, HOPPER).splits > 1
    assert choose(wide, HOPPER).splits == 1
    assert choose(Product("linear", "Q4_0", 1000, 320, 96), AMPERE).block_k == 32
    assert choose(Product("conv", "Q4_0", 1000, 320, 288, taps=9), AMPERE).block_k == 32
    assert best_splits(Product("linear", "Q4_0", 1, 64, 64), SMALL, 100) == 1  # one step cannot be split


def test_measured_launches_come_first(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches, "_measured", {})
    launches.Prepared.forget()
    product, mine = Product("linear", "Q8_0", 77, 640, 2048), Launch(32, 32, 32, warps=2, stages=2, splits=2)
    result = Measured(mine, fused=3.0, dequantize=2.0, resident=1.0)
    launches.save_measured(tmp_path / "table.json", "a GPU", {product: result})
    assert launches.measured(product, AMPERE) is None
    assert launches.load_measured(tmp_path / "table.json", AMPERE) == 1
    assert launches.measured(product, AMPERE) == result
    assert result.fastest == "dequantize"
    assert choose(product, AMPERE) == mine
    assert choose(replace(product, m=78), AMPERE) != mine


def test_candidates_are_valid_and_hold_the_choice() -> None:
    for family in launches.UNTUNED:
        for product in (Product("linear", "Q4_0", 77, 1280, 2048), Product("conv", "Q8_0", 512, 640, 288, taps=9)):
            found = candidates(product, family, 80)
            assert choose(product, Gpu("", family, 80)) in found
            assert all(product.step_multiple % c.block_k == 0 and c.splits >= 1 for c in found)


def test_errors_give_the_values(material: Any, device: torch.device) -> None:
    weight = repack(material.weight("Q4_0", 5, 64, seed=15)[0], "Q4_0")
    x = material.normal(2, 64, seed=16)
    with pytest.raises(ValueError, match=r"torch\.float32"):
        linear_fused(x.float(), weight)
    with pytest.raises(ValueError, match=r"\[2, 63\].*64 inputs"):
        linear_fused(x[:, 1:], weight)
    with pytest.raises(ValueError, match="of which there are 5"):
        linear_fused(x, weight, geglu=True)
    with pytest.raises(ValueError, match=r"\[5\], got \[4\]"):
        linear_fused(x, weight, material.normal(4, seed=17))
    with pytest.raises(ValueError, match=r"\[2, 5\].*\[2, 4\]"):
        linear_fused(x, weight, residual=material.normal(2, 4, seed=18))
    assert linear_fused(x[:0], weight).shape == (0, 5)
