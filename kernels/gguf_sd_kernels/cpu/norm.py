"""Normalisation fused with the activation that follows it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def group_norm_silu(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float = 1e-5, silu: bool = True
) -> Tensor:
    """Group normalisation of ``x [B, C, H, W]`` with ``weight, bias [C]``, then SiLU when ``silu`` is set.

    On a CPU torch's own kernel on channels-last input wins, 2.2 to 3.7 times as fast as after a copy to NCHW
    (bfloat16, Zen 5, 320 and 960 channels of 64x64), with SiLU in place; parameters stay float32 there.
    That kernel takes the variance as E[x^2] - E[x]^2: at a mean of 30 deviations float32 keeps 5 digits.
    Raises ValueError when the groups do not divide the channels or the parameters do not fit.
    """
    check_group_norm(x, groups, weight, bias)
    kind = torch.float32 if x.device.type == "cpu" and x.dtype.itemsize == 2 else x.dtype
    y = F.group_norm(x, groups, weight.to(kind), bias.to(kind), eps)
    return F.silu(y, inplace=True) if silu else y


def check_group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor) -> None:
    """Raises ValueError when the groups do not divide the channels or the parameters do not fit."""
    channels = x.shape[1] if x.ndim > 1 else 0
    if not channels or groups < 1 or channels % groups or weight.shape != (channels,) or bias.shape != (channels,):
        raise ValueError(
            f"group norm of {list(x.shape)} in {groups} groups takes weight and bias [{channels}] and groups that "
            f"divide it, got weight {list(weight.shape)}, bias {list(bias.shape)}"
        )
