"""Quantisers against gguf-py: its format bit for bit, and never a larger error."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from gguf_sd_convert.quantize import quantizers
from gguf_sd_convert.quantize.quantizers import quantize

SEARCHED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1")


def samples(kind: str, rows: int = 40, cols: int = 320) -> torch.Tensor:
    g = torch.Generator().manual_seed(sum(kind.encode()))
    normal = torch.randn(rows, cols, generator=g)
    uniform = torch.rand(rows, cols, generator=g)
    return {
        "gaussian": normal * 0.02,
        "uniform": uniform - 0.5,
        "laplace": normal.sign() * uniform.log(),
        "outliers": torch.where(uniform > 0.98, 20 * normal, normal),
        "offset": normal * 0.01 + 1.0,
        "positive": uniform + 0.1,
        "tiny": normal * 1e-6,
        "large": normal * 1e4,
    }[kind]


def decode(blocks: torch.Tensor, qtype: str) -> torch.Tensor:
    return torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[qtype]))


def reference(x: torch.Tensor, qtype: str) -> torch.Tensor:
    return torch.from_numpy(gguf.quants.quantize(x.float().numpy(), gguf.GGMLQuantizationType[qtype]))


def relative_rms(x: torch.Tensor, y: torch.Tensor) -> float:
    return ((x.double() - y.double()).norm() / x.double().norm()).item()


# Gaussian figures of stable-diffusion.cpp are 0.0817 and 0.0702, of gguf-py 0.0861 and 0.0786.
@pytest.mark.parametrize(
    ("qtype", "bound"), [("Q4_0", 0.0815), ("Q4_1", 0.0698), ("Q5_0", 0.0408), ("Q5_1", 0.0343), ("Q8_0", 0.0055)]
)
def test_gaussian_error(qtype: str, bound: float) -> None:
    x = torch.randn(256, 1280, generator=torch.Generator().manual_seed(5)) * 0.02
    assert relative_rms(x, decode(quantize(x, qtype), qtype)) < bound


@pytest.mark.parametrize("qtype", SEARCHED)
@pytest.mark.parametrize("kind", ["gaussian", "uniform", "laplace", "outliers", "offset", "positive", "tiny", "large"])
def test_never_worse_than_gguf_py(qtype: str, kind: str) -> None:
    """In any single block."""
    x = samples(kind)
    ours = (decode(quantize(x, qtype), qtype) - x).double().view(-1, 32).norm(dim=1)
    theirs = (decode(reference(x, qtype), qtype) - x).double().view(-1, 32).norm(dim=1)
    assert (ours <= theirs * (1 + 1e-4) + 1e-12).all()
    assert ours.square().sum() < theirs.square().sum()


@pytest.mark.parametrize("qtype", SEARCHED)
@pytest.mark.parametrize("kind", ["gaussian", "uniform", "laplace", "outliers"])
def test_error_is_near_the_best_scale(qtype: str, kind: str) -> None:
    """An exhaustive search over scales (and minima) gains little more."""
    x = samples(kind, 8, 320).view(-1, 32)
    levels = {"Q4_0": 15, "Q4_1": 15, "Q5_0": 31, "Q5_1": 31}[qtype]
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    best = torch.full((x.shape[0],), float("inf"))
    for step in range(-60, 61) if qtype.endswith("0") else range(400):
        if qtype.endswith("0"):
            d = torch.where(high > -low, high, low) / -(levels + 1) * 2 * (1 + step / 150)
            q = (x / d).round().clamp(-(levels + 1) // 2, levels // 2)
            decoded = q * d
        else:
            a, b = (step % 20) / 100 - 0.05, (step // 20) / 100 - 0.05
            m, d = low + a * (high - low), (high - low) * (1 - a - b) / levels
            decoded = ((x - m) / d).round().clamp(0, levels) * d + m
        best = torch.minimum(best, (decoded - x).square().sum(1))
    error = (decode(quantize(x, qtype), qtype) - x).square().sum()
    assert error < 1.05 * best.sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["gaussian", "outliers", "tiny", "large"])
def test_q8_0_is_byte_identical(kind: str, dtype: torch.dtype) -> None:
    x = samples(kind).clamp(-6e4, 6e4).to(dtype)
    assert torch.equal(quantize(x, "Q8_0"), reference(x, "Q8_0"))


def test_q8_0_rounds_halves_away_from_zero() -> None:
    x = torch.tensor([[127.0, 0.5, -0.5, 1.5, -2.5, *[0.0] * 27]])
    assert quantize(x, "Q8_0")[0, 2:7].view(torch.int8).tolist() == [127, 1, -1, 2, -3]


@pytest.mark.parametrize("qtype", [*SEARCHED, "Q8_0"])
def test_blocks_that_are_easy_to_get_wrong(qtype: str) -> None:
    x = torch.zeros(7, 32)
    x[1] = 0.75  # constant
    x[2, 5] = -3.0  # one value
    x[3, :2] = torch.tensor([65000.0, -65000.0])
    x[4] = 2.0**-24 * torch.arange(32)  # scales below float16's smallest
    x[5] = torch.linspace(-1e-42, 1e-42, 32)  # denormal in float32
    x[6] = -torch.arange(32.0)
    decoded = decode(quantize(x, qtype), qtype)
    assert decoded.isfinite().all()
    step = x.abs().amax(1, keepdim=True) / {"4": 7, "5": 15, "8": 127}[qtype[1]]
    # gguf-py's Q8_0, which ours equals, drops what would need a scale below float16's smallest.
    floor = 31 * 2.0**-24 if qtype == "Q8_0" else 2.0**-24
    assert ((decoded - x).abs() <= step * 1.01 + floor).all()
    assert (decoded[0] == 0).all()
    assert torch.allclose(decoded[1], x[1], rtol=5e-3)


@pytest.mark.parametrize("qtype", [*SEARCHED, "Q8_0"])
def test_exact_where_the_format_is(qtype: str) -> None:
    """Values on the grid of a block come back unchanged."""
    levels = {"4": 16, "5": 32, "8": 255}[qtype[1]]
    zero = {"0": levels // 2, "1": 0}[qtype[-1]]
    generator = torch.Generator().manual_seed(11)
    q = torch.randint(0, levels, (64, 32), generator=generator)
    q[:, 0], q[:, 1] = 0, levels - 1
    x = (q - zero) * 0.125 + (3.0 if qtype.endswith("1") else 0.0)
    assert torch.equal(decode(quantize(x, qtype), qtype), x)


def test_slices_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    x = samples("gaussian")
    whole = quantize(x, "Q4_1")
    monkeypatch.setattr(quantizers, "SLICE", 37)
    assert torch.equal(quantize(x, "Q4_1"), whole)


def test_takes_strided_rows() -> None:
    x = samples("gaussian", 64, 96)
    assert torch.equal(quantize(x.t(), "Q4_0"), quantize(x.t().contiguous(), "Q4_0"))


@pytest.mark.parametrize(("qtype", "cols"), [("Q4_0", 33), ("Q8_0", 0), ("Q9_9", 32)])
def test_refuses(qtype: str, cols: int) -> None:
    with pytest.raises(ValueError, match=r"multiple of 32|choose from"):
        quantize(torch.zeros(2, cols), qtype)


def test_array_order_is_that_of_numpy() -> None:
    """Row r of the result is row r of the input."""
    x = samples("gaussian", 6, 64)
    rows = np.stack([quantize(row[None], "Q4_0").numpy()[0] for row in x])
    assert (quantize(x, "Q4_0").numpy() == rows).all()
