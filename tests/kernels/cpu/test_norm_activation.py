"""Group norm with SiLU, and GEGLU, against their formulas in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gguf_sd_kernels import ops
from gguf_sd_kernels.cpu import activation

DTYPES = [(torch.float32, 1e-5), (torch.bfloat16, 6e-3), (torch.float16, 1e-3)]


def relative_error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


def group_norm_exact(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    grouped = x.double().reshape(x.shape[0], groups, -1)
    centred = grouped - grouped.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return normed.view(x.shape) * weight.double()[:, None, None] + bias.double()[:, None, None]


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("parameters", [torch.float32, None])
def test_group_norm_silu(
    dtype: torch.dtype, tolerance: float, channels_last: bool, silu: bool, parameters: torch.dtype | None
) -> None:
    gen = torch.Generator().manual_seed(1)
    x = (torch.randn(2, 96, 5, 7, generator=gen) * 0.1 + 0.2).to(dtype)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    before = x.clone()
    weight, bias = (torch.randn(96, generator=gen).to(parameters or dtype) for _ in range(2))
    got = ops.group_norm_silu(x, 32, weight, bias, 1e-2, silu)
    want = group_norm_exact(x, 32, weight, bias, 1e-2)
    want = want * want.sigmoid() if silu else want
    assert got.dtype == dtype
    assert relative_error(got, want) < tolerance
    assert torch.equal(x, before)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("chunk", [1, 100, 1 << 19])
def test_geglu(dtype: torch.dtype, tolerance: float, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation, "CHUNK_VALUES", chunk)
    x = (2 * torch.randn(2, 9, 2 * 37, generator=torch.Generator().manual_seed(2))).to(dtype)
    before = x.clone()
    value, gate = x.double().chunk(2, -1)
    want = value * 0.5 * gate * (1 + torch.erf(gate / 2**0.5))
    got = ops.geglu(x)
    assert got.dtype == dtype
    assert got.shape == (2, 9, 37)
    assert relative_error(got, want) < tolerance
    assert torch.equal(x, before)


def test_gradients_flow() -> None:
    gen = torch.Generator().manual_seed(3)
    x = torch.randn(2, 6, 2, 2, generator=gen, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(2, 6, generator=gen, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda t: ops.group_norm_silu(t, 3, weight, bias), x)
    assert torch.autograd.gradcheck(ops.geglu, x)


def test_errors_give_the_values() -> None:
    with pytest.raises(ValueError, match=r"\[2, 7\]"):
        ops.geglu(torch.randn(2, 7))
    with pytest.raises(ValueError, match=r"\[1, 6, 2, 2\] in 4 groups"):
        ops.group_norm_silu(torch.randn(1, 6, 2, 2), 4, torch.ones(6), torch.zeros(6))
    with pytest.raises(ValueError, match=r"bias \[5\]"):
        ops.group_norm_silu(torch.randn(1, 6, 2, 2), 3, torch.ones(6), torch.zeros(5))
