"""Convolutions of enlarged maps on a CPU, against torch's of the map enlarged."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from gguf_sd_kernels.cpu import enlarged


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("size", [(1, 1), (1, 5), (7, 4)])
@pytest.mark.parametrize("biased", [True, False])
def test_as_torch(dtype: torch.dtype, limit: float, size: tuple[int, int], biased: bool) -> None:
    random = torch.Generator().manual_seed(1)
    x = torch.randn(2, 5, *size, generator=random).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(3, 5, 3, 3, generator=random).to(dtype)
    bias = torch.randn(3, generator=random).to(dtype) if biased else None
    double = None if bias is None else bias.double()
    want = F.conv2d(F.interpolate(x.double(), scale_factor=2.0), weight.double(), double, padding=1)
    got = enlarged.conv2d_enlarged(x, weight, bias)
    assert got.dtype == dtype
    assert got.shape == want.shape
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert (got.double() - want).norm() / want.norm() < limit


def test_where_it_pays() -> None:
    weight = torch.empty(4, 4, 3, 3)
    x = torch.empty(1, 4, 64, 64)
    assert enlarged.pays(x, (128, 128), weight, 1, 1)
    assert not enlarged.pays(x, (127, 128), weight, 1, 1)
    assert not enlarged.pays(x, (128, 128), weight[..., :1, :1], 1, 0)
    assert not enlarged.pays(x[..., :8, :8], (16, 16), weight, 1, 1)
    assert not enlarged.pays(x.to("meta"), (128, 128), weight, 1, 1)
