"""Attention against the formula in float64."""

from __future__ import annotations

import pytest
import torch
from gguf_sd_kernels import ops
from torch import Tensor

SHAPES = [  # (B, H, N, M, D): self- and cross-attention, the head sizes of SD 1.5 and SDXL, odd lengths
    (2, 8, 300, 300, 40),
    (1, 3, 130, 77, 64),
    (2, 2, 65, 77, 160),
    (1, 1, 1, 1, 8),
    (2, 1, 1100, 1030, 80),
    (1, 1, 257, 257, 512),
]


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = q.double(), k.double(), v.double()
    return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)]
)
@pytest.mark.parametrize("sharpness", [1.0, 30.0])
def test_attention(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float, sharpness: float) -> None:
    b, h, n, m, d = shape
    gen = torch.Generator().manual_seed(n)
    q = (sharpness * torch.randn(b, n, h, d, generator=gen)).to(dtype).transpose(1, 2)
    k = torch.randn(b, m, h, d, generator=gen).to(dtype).transpose(1, 2)
    v = torch.randn(b, h, m, d, generator=gen).to(dtype)
    got, want = ops.attention(q, k, v), exact(q, k, v)
    assert got.dtype == dtype
    assert got.shape == want.shape
    assert (got.double() - want).norm() / want.norm() < tolerance


def test_shapes_that_do_not_fit() -> None:
    q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 5, 8)
    with pytest.raises(ValueError, match=r"q \[1, 2, 3, 8\], k \[1, 2, 5, 8\], v \[1, 2, 3, 8\]"):
        ops.attention(q, k, q)
