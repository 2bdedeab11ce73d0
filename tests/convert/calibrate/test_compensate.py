"""Error-compensating rounding against dense least squares, and against gguf-py's decoder."""

from __future__ import annotations

import gguf
import pytest
import torch

from gguf_sd_convert.calibrate.compensate import DAMPING, inverse_factor, round_compensated
from gguf_sd_convert.calibrate.fixed_grid import round_on_grid
from gguf_sd_convert.quantize.quantizers import quantize

TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
GRIDS = ("Q4_K", "Q5_K", "Q6_K", "IQ4_NL")


def layer(rows: int = 24, cols: int = 96, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and second moments of inputs that hang together."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2000, cols // 4, generator=g) @ torch.randn(cols // 4, cols, generator=g)
    x += 0.3 * torch.randn(2000, cols, generator=g)
    return torch.randn(rows, cols, generator=g) * 0.05, x.T @ x / len(x)


def decode(blocks: torch.Tensor, qtype: str) -> torch.Tensor:
    return torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[qtype]))


def cost(values: torch.Tensor, weight: torch.Tensor, moments: torch.Tensor) -> torch.Tensor:
    """Of each row, the expected squared change of its output."""
    change = (values - weight).double()
    return ((change @ moments.double()) * change).sum(1)


def damped(moments: torch.Tensor) -> torch.Tensor:
    return moments + DAMPING * moments.diagonal().mean() * torch.eye(len(moments))


def test_factor_is_that_of_the_inverse() -> None:
    _, moments = layer()
    upper = inverse_factor(moments)
    assert torch.equal(upper, upper.triu())
    inverse = torch.linalg.inv(damped(moments).double())
    assert (upper.double().T @ upper.double() - inverse).norm() < 1e-3 * inverse.norm()


@pytest.mark.parametrize("qtype", TYPES)
def test_values_are_what_gguf_py_decodes_and_the_cost_is_theirs(qtype: str) -> None:
    weight, moments = layer()
    rounded = round_compensated(weight, moments, qtype)
    assert torch.equal(decode(rounded.blocks, qtype), rounded.values)
    expected = cost(rounded.values, weight, damped(moments))
    assert torch.allclose(rounded.cost.double(), expected, rtol=2e-2)


@pytest.mark.parametrize("qtype", TYPES)
def test_costs_a_fraction_of_rounding_to_the_nearest(qtype: str) -> None:
    weight, moments = layer()
    nearest = cost(decode(quantize(weight, qtype), qtype), weight, moments).sum()
    assert cost(round_compensated(weight, moments, qtype).values, weight, moments).sum() < 0.3 * nearest


@pytest.mark.parametrize("qtype", GRIDS)
def test_on_a_fixed_grid(qtype: str) -> None:
    weight, moments = layer(cols=512)
    rounded = round_on_grid(weight, moments, qtype)
    assert torch.equal(decode(rounded.blocks, qtype), rounded.values)
    assert torch.allclose(rounded.cost.double(), cost(rounded.values, weight, damped(moments)), rtol=2e-2)
    nearest = cost(decode(quantize(weight, qtype), qtype), weight, moments).sum()
    assert cost(rounded.values, weight, moments).sum() < 0.4 * nearest


def test_what_follows_is_the_dense_least_squares_optimum() -> None:
    """With the first block rounded, the best values of the second are a least-squares problem; Q8_0 is fine enough to
    see that they are what was rounded."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(4000, 8, generator=g) @ torch.randn(8, 64, generator=g) + 0.3 * torch.randn(4000, 64, generator=g)
    x[:, 32:] *= 0.5  # so that the first block goes first
    weight, moments = torch.randn(6, 64, generator=g), x.T @ x / len(x)
    weight[:, :32] *= 100  # whose steps, and so errors, are as large as the other block's values
    values = round_compensated(weight, moments, "Q8_0").values
    rest = torch.cat([x, (DAMPING * moments.diagonal().mean() * len(x)).sqrt() * torch.eye(64)]).double()
    wanted = rest @ weight.double().T - rest[:, :32] @ values[:, :32].double().T
    best = torch.linalg.lstsq(rest[:, 32:], wanted).solution.T
    moved = (best - weight[:, 32:].double()).norm()
    assert moved > 0.05 * weight[:, 32:].norm()
    assert (values[:, 32:].double() - best).norm() < 0.1 * moved


def test_a_small_problem_comes_near_its_exhaustive_optimum() -> None:
    """Of every code but the last five the rounding's own, those five tried in all 16^5 ways: little is left."""
    weight, moments = layer(rows=1, cols=32, seed=4)
    rounded = round_compensated(weight, moments, "Q4_0")
    h = damped(moments).double()
    d = float(rounded.blocks[0, :2].view(torch.float16))
    last = moments.diagonal().argsort(descending=True)[-5:]
    codes = torch.cartesian_prod(*[torch.arange(-8, 8)] * 5).double()
    change = (rounded.values - weight).double().expand(len(codes), -1).clone()
    change[:, last] = codes * d - weight[0, last].double()
    best = float(((change @ h) * change).sum(1).min())
    assert float(rounded.cost[0]) < 1.3 * best


def test_importances_alone_choose_the_scale() -> None:
    weight, _ = layer(rows=64, cols=64)
    importance = torch.ones(64)
    importance[::8] = 100.0
    plain = decode(quantize(weight, "Q4_0"), "Q4_0")
    heeded = round_compensated(weight, importance, "Q4_0").values
    assert ((heeded - weight).square() * importance).sum() < 0.9 * ((plain - weight).square() * importance).sum()


def test_inputs_that_are_always_zero() -> None:
    weight, moments = layer()
    moments[:40] = moments[:, :40] = 0
    assert torch.isfinite(round_compensated(weight, moments, "Q4_1").values).all()
    assert torch.isfinite(round_compensated(weight, torch.zeros(96, 96), "Q4_0").values).all()
