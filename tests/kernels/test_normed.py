"""Layer norms folded into the products around them, against plain torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gguf_sd_kernels import normed
from gguf_sd_kernels.normed import fold, linear_measured, normed_linear
from gguf_sd_kernels.repack import PACKED_TYPES, repack
from gguf_sd_kernels.row_parts import MAX_PARTS, RowParts
from gguf_sd_kernels.triton.linear import PreparedLinear
from gguf_sd_kernels.tuning import verdicts
from gguf_sd_kernels.tuning.launch import Launch, Prepared
from gguf_sd_kernels.tuning.self_check import DisagreementError, Subject
from gguf_sd_kernels.tuning.verdicts import Verdicts

SMALL = Launch(32, 64, 64, warps=4, stages=2)
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.5e-2}  # the interpreter cuts to bfloat16 where GPUs round


@pytest.fixture(autouse=True)
def nothing_prepared() -> Iterator[None]:
    Prepared.forget()
    yield
    Prepared.forget()


def expected(x: Tensor, norm: tuple[Tensor, Tensor], weight: Tensor, bias: Tensor | None, geglu: bool) -> Tensor:
    rows = F.layer_norm(x.double(), (x.shape[-1],), norm[0].double(), norm[1].double(), 1e-5)
    y = F.linear(rows, weight, None if bias is None else bias.double())
    if geglu:
        value, gate = y.chunk(2, dim=-1)
        y = value * F.gelu(gate)
    return y


def norm_of(width: int, dtype: torch.dtype, material: Any) -> tuple[Tensor, Tensor]:
    return 1 + 0.3 * material.normal(width, seed=20, dtype=dtype), material.normal(width, seed=21, dtype=dtype)


@pytest.mark.parametrize("qtype", PACKED_TYPES)
@pytest.mark.parametrize(
    ("dtype", "geglu", "swap", "splits"),
    [
        (torch.float16, False, False, 1),
        (torch.float16, False, True, 3),
        (torch.float16, True, False, 3),
        (torch.float16, True, True, 1),
        (torch.bfloat16, False, False, 3),
        (torch.bfloat16, True, True, 1),
    ],
)
def test_a_norm_within_the_product(
    qtype: str, dtype: torch.dtype, geglu: bool, swap: bool, splits: int, material: Any
) -> None:
    """Edges in M and N; rows whose mean is as large as their deviation; parts of which the last is shorter."""
    blocks, weight = material.weight(qtype, 140, 320, seed=1)
    mean = 1 if dtype == torch.float16 else 0.3
    x = material.normal(2, 19, 320, seed=2, dtype=dtype) + mean
    bias, norm = material.normal(140, seed=3, dtype=dtype), norm_of(320, dtype, material)
    packed = repack(blocks, qtype)
    parts = RowParts.of(x.flatten(0, 1), 96)
    chosen = replace(SMALL, swap=swap, splits=splits)
    run = PreparedLinear(x, packed, bias, None, geglu, chosen, normed=(parts, 1e-5))
    got = run.normed(x, packed, parts, fold(packed, bias, *norm, 1e-5, dtype))
    assert got.dtype == dtype
    assert material.error(got, expected(x, norm, weight, bias, geglu)) < TOLERANCE[dtype]


def test_rows_far_from_zero(material: Any) -> None:
    """A mean of 30 deviations, where a product of rows as they are has to cancel all but a thirtieth."""
    blocks, weight = material.weight("Q8_0", 64, 320, seed=4)
    x = material.normal(20, 320, seed=5) + 30
    norm, packed, parts = norm_of(320, torch.float16, material), repack(blocks, "Q8_0"), RowParts.of(x, 64)
    run = PreparedLinear(x, packed, None, None, False, SMALL, normed=(parts, 1e-5))
    got = run.normed(x, packed, parts, fold(packed, None, *norm, 1e-5, torch.float16))
    assert material.error(got, expected(x, norm, weight, None, False)) < 2e-3


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize(("block_m", "block_n"), [(32, 64), (256, 128)])
def test_a_product_leaves_the_statistics_of_its_rows(block_m: int, block_n: int, splits: int, material: Any) -> None:
    """Of what it has rounded; the larger tile is stored in halves, of which the last is outside."""
    blocks, _ = material.weight("Q4_0", 140, 128, seed=6)
    x, residual = material.normal(21, 128, seed=7), material.normal(21, 140, seed=8) + 20
    packed = repack(blocks, "Q4_0")
    chosen = Launch(block_m, block_n, 64, warps=8, stages=2, splits=splits)
    y, parts = PreparedLinear(x, packed, None, residual, False, chosen).measured(x, packed, None, residual)
    assert parts is not None
    assert parts.width == 64
    torch.testing.assert_close(parts.values, RowParts.of(y, 64).values, rtol=1e-5, atol=1e-5)


def chain(material: Any, mode: str = "fused") -> tuple[Tensor, Tensor, list[str]]:
    """Two layers with a norm between them: the result, what it should be, and which kernels are folded."""
    (first, one), (second, other) = (material.weight("Q4_0", 96, 64, seed=9), material.weight("Q4_0", 64, 96, seed=10))
    x, norm = material.normal(9, 64, seed=11), norm_of(96, torch.float16, material)
    packed = repack(second, "Q4_0")
    h = linear_measured(x, repack(first, "Q4_0"), None, None, mode)
    run = None
    if h.parts is not None:
        run = normed_linear(h.rows, h.parts, packed, None, 1e-5, geglu=False, mode=mode)
    kinds = ["parts"] * (h.parts is not None) + ["norm"] * (run is not None)
    if run is None:
        got = normed.linear_packed(F.layer_norm(h.rows, (96,), *norm), packed, mode=mode)
    else:
        assert h.parts is not None
        got = run.normed(h.rows, packed, h.parts, fold(packed, None, *norm, 1e-5, torch.float16))
    return got, expected(F.linear(x.double(), one), norm, other, None, False), kinds


@pytest.mark.parametrize("bad", ["", "parts", "norm"])
def test_what_is_set_aside_is_done_apart(bad: str, material: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    device = material.normal(1, seed=12).device
    asked = []

    def check(subject: Subject, device: torch.device) -> None:
        asked.append(subject)
        if bad in subject.added:
            raise DisagreementError("wrong on purpose")

    monkeypatch.setenv(verdicts.SWITCH, "1")
    monkeypatch.setattr(verdicts, "_of", {device: Verdicts(device, check=check)})
    got, want, kinds = chain(material)
    assert kinds == {"": ["parts", "norm"], "parts": [], "norm": ["parts"]}[bad]
    assert {s.added for s in asked} >= ({("parts",)} | ({("norm",)} if bad != "parts" else set()))
    assert material.error(got, want) < 2e-3


def test_other_modes_take_a_norm_of_its_own(material: Any) -> None:
    got, want, kinds = chain(material, "dequantize")
    assert not kinds
    assert material.error(got, want) < 2e-3
    with pytest.raises(ValueError, match="no mode 'quick'"):
        chain(material, "quick")


def test_more_parts_than_a_product_joins(material: Any) -> None:
    packed = repack(material.weight("Q4_0", 32, 1088, seed=13)[0], "Q4_0")
    x = material.normal(3, 1088, seed=14)
    assert normed_linear(x, RowParts.of(x, 32), packed, None, 1e-5, geglu=False, mode="fused") is None
    for parts in (RowParts.of(x, 32), RowParts.of(x[:2], 64)):
        with pytest.raises(ValueError, match=f"of at most {MAX_PARTS} parts, got"):
            PreparedLinear(x, packed, None, None, False, SMALL, normed=(parts, 1e-5))
