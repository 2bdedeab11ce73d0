"""Fused convolutions against float64 convolutions of gguf-py's weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gguf_sd_kernels.enlarged import conv2d_enlarged
from gguf_sd_kernels.repack import PACKED_TYPES, PackedWeight, repack
from gguf_sd_kernels.triton.conv import conv2d_fused
from gguf_sd_kernels.tuning import launch as launches
from gguf_sd_kernels.tuning import verdicts
from gguf_sd_kernels.tuning.launch import Launch
from gguf_sd_kernels.tuning.self_check import DisagreementError, Subject
from gguf_sd_kernels.tuning.verdicts import Verdicts

Shape = tuple[int, int, int, int]
SMALL = Launch(32, 32, 32, warps=4, stages=2)


def conv_weight(material: Any, qtype: str, shape: Shape, seed: int) -> tuple[PackedWeight, Tensor]:
    """Tap-major blocks, packed, and the weight they stand for, float64 [OC, IC, KH, KW]."""
    oc, ic, kh, kw = shape
    blocks, flat = material.weight(qtype, oc, kh * kw * ic, seed)
    return repack(blocks, qtype, shape, tap_major=True), flat.view(oc, kh, kw, ic).permute(0, 3, 1, 2)


CASES = [  # weight, batch, picture, stride, padding
    ((33, 64, 3, 3), 2, (7, 5), 1, 1),
    ((33, 64, 3, 3), 1, (7, 5), 2, 1),
    ((40, 32, 3, 3), 2, (6, 9), 2, 0),
    ((40, 32, 3, 3), 1, (1, 1), 1, 1),  # eight of nine taps lie outside
    ((17, 96, 1, 1), 2, (5, 3), 1, 0),
    ((17, 96, 1, 1), 1, (5, 3), 2, 0),
    ((17, 32, 3, 2), 1, (5, 4), 1, 1),
]


@pytest.mark.parametrize("qtype", PACKED_TYPES)
@pytest.mark.parametrize(("shape", "batch", "size", "stride", "padding"), CASES)
def test_conv(
    qtype: str, shape: Shape, batch: int, size: tuple[int, int], stride: int, padding: int, material: Any
) -> None:
    weight, full = conv_weight(material, qtype, shape, seed=1)
    x = material.normal(batch, shape[1], *size, seed=2)
    bias, emb = material.normal(shape[0], seed=3), material.normal(batch, shape[0], seed=4)
    want = F.conv2d(x.double(), full, bias.double(), stride, padding)
    assert material.error(conv2d_fused(x, weight, bias, stride, padding, launch=SMALL), want) < 2e-3
    residual = material.normal(*want.shape, seed=5)
    want += emb.double()[:, :, None, None] + residual.double()
    chosen = replace(SMALL, splits=2, swap=True)
    got = conv2d_fused(x, weight, bias, stride, padding, emb=emb, residual=residual, launch=chosen)
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert material.error(got, want) < 2e-3


@pytest.mark.parametrize("qtype", PACKED_TYPES)
@pytest.mark.parametrize(("size", "enlarged"), [((4, 3), (8, 6)), ((4, 3), (7, 5)), ((3, 4), (5, 8)), ((1, 1), (2, 1))])
def test_enlarged_before(qtype: str, size: tuple[int, int], enlarged: tuple[int, int], material: Any) -> None:
    """To twice the size, or one less, as a picture of an odd size has it."""
    weight, full = conv_weight(material, qtype, (33, 64, 3, 3), seed=11)
    x, bias = material.normal(2, 64, *size, seed=12), material.normal(33, seed=13)
    want = F.conv2d(F.interpolate(x, size=enlarged).double(), full, bias.double(), padding=1)
    chosen = replace(SMALL, splits=2) if qtype == "Q4_0" else SMALL
    got = conv2d_fused(x, weight, bias, padding=1, enlarged=enlarged, launch=chosen)
    assert material.error(got, want) < 2e-3
    with pytest.raises(ValueError, match="twice its size, or one less"):
        conv2d_fused(x, weight, bias, padding=1, enlarged=(enlarged[0] + 2, enlarged[1]))


@pytest.mark.parametrize(
    ("enlarged", "mode", "bad", "seen"),
    [
        ((7, 6), "fused", False, {("bias", "enlarge")}),
        ((7, 6), "fused", True, {("bias", "enlarge"), ("bias",)}),
        ((9, 6), "fused", False, {("bias",)}),
        ((8, 6), "dequantize", False, {()}),
    ],
)
def test_enlarged_apart(
    enlarged: tuple[int, int],
    mode: str,
    bad: bool,
    seen: set[tuple[str, ...]],
    material: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The picture is written where the kernel is set aside, or is not for such a size or mode."""
    weight, full = conv_weight(material, "Q8_0", (16, 32, 3, 3), seed=14)
    x, bias = material.normal(1, 32, 4, 3, seed=15), material.normal(16, seed=16)
    asked = set()

    def check(subject: Subject, device: torch.device) -> None:
        asked.add(subject.added)
        if bad and "enlarge" in subject.added:
            raise DisagreementError("wrong on purpose")

    monkeypatch.setenv(verdicts.SWITCH, "1")
    monkeypatch.setattr(verdicts, "_of", {x.device: Verdicts(x.device, check=check)})
    launches.Prepared.forget()
    got = conv2d_enlarged(x, weight, bias, enlarged, 1, mode)
    launches.Prepared.forget()
    want = F.conv2d(F.interpolate(x, size=enlarged).double(), full, bias.double(), padding=1)
    assert material.error(got, want) < 2e-3
    assert asked == seen


@pytest.mark.parametrize("family", list(launches.UNTUNED))
def test_every_launch_in_the_table(family: str, material: Any) -> None:
    weight, full = conv_weight(material, "Q4_0", (70, 64, 3, 3), seed=6)
    x = material.normal(1, 64, 9, 8, seed=7).contiguous(memory_format=torch.channels_last)
    want = F.conv2d(x.double(), full, padding=1)
    for _, launch in launches.UNTUNED[family]:
        assert material.error(conv2d_fused(x, weight, padding=1, launch=launch), want) < 2e-3


def test_chosen_launch_in_bfloat16(material: Any, device: torch.device) -> None:
    channels, size = (1280, 17) if device.type == "cuda" else (32, 3)
    weight, full = conv_weight(material, "Q8_0", (channels, channels, 3, 3), seed=8)
    x = material.normal(2, channels, size, size, seed=9, dtype=torch.bfloat16)
    got = conv2d_fused(x, weight, padding=1)
    assert got.dtype == torch.bfloat16
    assert material.error(got, F.conv2d(x.double(), full, padding=1)) < 1e-2


def test_errors_give_the_values(material: Any) -> None:
    weight, _ = conv_weight(material, "Q4_0", (4, 32, 3, 3), seed=10)
    x = material.normal(2, 32, 4, 4, seed=11)
    with pytest.raises(ValueError, match=r"\[4, 32, 3, 3\] is not tap-major"):
        conv2d_fused(x, replace(weight, tap_major=False))
    with pytest.raises(ValueError, match=r"\[B, 32, H, W\]"):
        conv2d_fused(x[:, 1:], weight)
    with pytest.raises(ValueError, match="2 x 4 padded by 0 is smaller than 3 x 3"):
        conv2d_fused(x[:, :, :2], weight)
    with pytest.raises(ValueError, match=r"emb .* is \[2, 4\], got \[1, 4\]"):
        conv2d_fused(x, weight, padding=1, emb=material.normal(1, 4, seed=12))
    with pytest.raises(ValueError, match=r"residual .*\[2, 4, 4, 4\], got \[2, 4, 4, 3\]"):
        conv2d_fused(x, weight, padding=1, residual=material.normal(2, 4, 4, 3, seed=13))
    with pytest.raises(ValueError, match=r"torch\.float32"):
        conv2d_fused(x.float(), weight)
    with pytest.raises(ValueError, match="step of 64 channels does not divide 32"):
        conv2d_fused(x, weight, padding=1, launch=replace(SMALL, block_k=64))
