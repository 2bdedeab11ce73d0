"""Normalisation kernels against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from gguf_sd_kernels.triton import norm as triton_norm
from gguf_sd_kernels.triton.norm import group_norm_silu_triton, layer_norm_triton

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(
    ("batch", "channels", "groups", "size"),
    [(2, 320, 32, (5, 7)), (1, 96, 8, (1, 1)), (1, 30, 3, (33, 9)), (2, 64, 32, (16, 16))],
)
def test_group_norm(
    batch: int,
    channels: int,
    groups: int,
    size: tuple[int, int],
    whole: bool,
    silu: bool,
    dtype: torch.dtype,
    material: Any,
) -> None:
    x = material.normal(batch, channels, *size, seed=1, dtype=dtype) * 2 + 0.5
    weight, bias = material.normal(channels, seed=2, dtype=dtype), material.normal(channels, seed=3, dtype=dtype)
    want = F.group_norm(x.double(), groups, weight.double(), bias.double(), 1e-5)
    got = group_norm_silu_triton(x, groups, weight, bias, 1e-5, silu, whole)
    assert got.dtype == dtype
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert material.error(got, F.silu(want) if silu else want) < TOLERANCE[dtype]


@pytest.mark.parametrize("whole", [True, False])
def test_group_norm_over_many_tiles(whole: bool, material: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of several steps, the last of them short, far from zero mean, where E[x^2] - E[x]^2 would fail."""
    monkeypatch.setattr(triton_norm, "TILE_VALUES", 256)
    monkeypatch.setattr(triton_norm, "MAX_TILES", 5)
    monkeypatch.setattr(triton_norm, "WHOLE_VALUES", 64)
    x = material.normal(2, 32, 11, 9, seed=4, dtype=torch.float32) + 1000
    weight, bias = (material.normal(32, seed=s, dtype=torch.float32) for s in (5, 6))
    want = F.group_norm(x.double(), 8, weight.double(), bias.double(), 1e-5)
    assert material.error(group_norm_silu_triton(x, 8, weight, bias, silu=False, whole=whole), want) < 1e-3


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("width", [320, 1280, 33])
def test_layer_norm(width: int, dtype: torch.dtype, material: Any) -> None:
    x = material.normal(2, 9, width, seed=7, dtype=dtype) * 3 - 1
    weight, bias = material.normal(width, seed=8, dtype=dtype), material.normal(width, seed=9, dtype=dtype)
    want = F.layer_norm(x.double(), (width,), weight.double(), bias.double(), 1e-5)
    assert material.error(layer_norm_triton(x, weight, bias), want) < TOLERANCE[dtype]


def test_errors_give_the_values(material: Any) -> None:
    x, ones = material.normal(1, 8, 2, 2, seed=10), material.normal(8, seed=11)
    with pytest.raises(ValueError, match=r"\[1, 8, 2, 2\] in 3 groups"):
        group_norm_silu_triton(x, 3, ones, ones)
    with pytest.raises(ValueError, match=r"got weight \[8\], bias \[7\]"):
        group_norm_silu_triton(x, 2, ones, ones[:7])
    with pytest.raises(ValueError, match=r"\[2\].*got weight \[8\]"):
        layer_norm_triton(x, ones, ones)
    assert group_norm_silu_triton(x[:0], 2, ones, ones).shape == (0, 8, 2, 2)
