"""The gathered form of a convolution against float64, at sizes small enough for tests."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from gguf_sd_kernels.cpu import conv as conv_cpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tap_major", [True, False])
@pytest.mark.parametrize(("stride", "padding"), [(1, 0), (1, 1), (2, 1), (2, 0), (1, 2)])
@pytest.mark.parametrize("kernel", [(3, 3), (3, 2), (5, 5)])
def test_gathered_convolution(
    kernel: tuple[int, int],
    stride: int,
    padding: int,
    tap_major: bool,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(conv_cpu, "MIN_WEIGHTS", 0)
    gen = torch.Generator().manual_seed(1)
    x = torch.randn(2, 13, 8, 7, generator=gen).to(dtype).to(memory_format=torch.channels_last)
    weight = torch.randn(11, 13, *kernel, generator=gen).to(dtype)
    if tap_major:
        weight = weight.to(memory_format=torch.channels_last)
    bias = torch.randn(11, generator=gen).to(dtype)
    want = F.conv2d(x.double(), weight.double(), bias.double(), stride, padding)
    monkeypatch.setattr(F, "conv2d", None)  # it must not be what answers
    got = conv_cpu.convolve(x, weight, bias, stride, padding)
    assert got.shape == want.shape
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert (got.double() - want).norm() / want.norm() < (1e-2 if dtype == torch.bfloat16 else 1e-5)


def test_large_images_are_not_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv_cpu, "MIN_WEIGHTS", 0)
    monkeypatch.setattr(conv_cpu, "_gather", None)
    x, weight = torch.randn(1, 2, 23, 23), torch.randn(3, 2, 3, 3)
    assert torch.equal(conv_cpu.convolve(x, weight, None, 1, 1), F.conv2d(x, weight, None, 1, 1))
