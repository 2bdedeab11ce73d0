"""The CPU's products against float64, over shapes and strides that oneDNN is particular about."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gguf_sd_kernels.cpu import linear as linear_cpu
from gguf_sd_kernels.cpu.linear import product, product_geglu

DTYPES = [(torch.float32, 1e-5), (torch.bfloat16, 6e-3), (torch.float16, 1e-3)]
SHAPES = [(48,), (1, 48), (3, 7, 48), (2, 1, 5, 48), (0, 48), (2, 0, 48)]


def inputs(shape: tuple[int, ...], dtype: torch.dtype, strided: bool) -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(len(shape))
    x = torch.randn(*shape, generator=gen).to(dtype)
    if strided:
        x = torch.stack([x, -x], -1)[..., 0]
    return x, torch.randn(34, 48, generator=gen).to(dtype), torch.randn(34, generator=gen).to(dtype)


def assert_close(got: Tensor, want: Tensor, dtype: torch.dtype, tolerance: float) -> None:
    assert got.dtype == dtype
    assert got.shape == want.shape
    assert (got.double() - want).norm() <= tolerance * want.norm()


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("strided", [True, False])
def test_products(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    tolerance: float,
    with_bias: bool,
    strided: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(linear_cpu, "GEGLU_ROWS", 4)
    x, weight, bias = inputs(shape, dtype, strided)
    want = F.linear(x.double(), weight.double(), bias.double() if with_bias else None)
    assert_close(product(x, weight, bias if with_bias else None), want, dtype, tolerance)
    value, gate = want.chunk(2, -1)
    want = value * 0.5 * gate * (1 + torch.erf(gate / 2**0.5))
    assert_close(product_geglu(x, weight, bias if with_bias else None), want, dtype, tolerance)


def test_products_have_gradients() -> None:
    x, weight, _ = inputs((4, 48), torch.float32, strided=False)
    x.requires_grad_()
    product(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(4, 48))
    assert torch.autograd.gradcheck(lambda t: product_geglu(t, weight.double()), x.double())
