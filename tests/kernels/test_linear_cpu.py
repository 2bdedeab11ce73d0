"""The CPU's product against float64, over shapes and strides that oneDNN is particular about."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from gguf_sd_kernels.linear_cpu import product


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-3), (torch.float16, 1e-3)])
@pytest.mark.parametrize("shape", [(48,), (1, 48), (3, 7, 48), (2, 1, 5, 48), (0, 48), (2, 0, 48)])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("strided", [True, False])
def test_product(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float, with_bias: bool, strided: bool) -> None:
    gen = torch.Generator().manual_seed(len(shape))
    x = torch.randn(*shape, generator=gen).to(dtype)
    if strided:
        x = torch.stack([x, -x], -1)[..., 0]
    weight, bias = (torch.randn(*s, generator=gen).to(dtype) for s in ((33, 48), (33,)))
    got = product(x, weight, bias if with_bias else None)
    want = F.linear(x.double(), weight.double(), bias.double() if with_bias else None)
    assert got.dtype == dtype
    assert got.shape == want.shape
    assert (got.double() - want).norm() <= tolerance * want.norm()


def test_product_has_gradients() -> None:
    gen = torch.Generator().manual_seed(9)
    x = torch.randn(4, 32, generator=gen, requires_grad=True)
    weight = torch.randn(5, 32, generator=gen)
    product(x, weight, None).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(4, 32))
