"""The operators that torch.compile and torch.export see: as torch wants operators, and as the functions they stand
for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gguf_sd_kernels import custom_ops, dispatch, ops
from gguf_sd_kernels.custom_ops import NAMESPACE
from gguf_sd_kernels.repack import PackedWeight, repack

CHECKED = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
Call = tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[Any, ...], dict[str, Any]]


def normal(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def last(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """Pictures [B, C, H, W], channels-last."""
    return normal(*shape, dtype=dtype).to(memory_format=torch.channels_last)


@pytest.fixture
def calls(material: Any) -> dict[str, Call]:
    """name -> (operator's function, what it stands for, arguments, keywords)."""

    def blocks(qtype: str, rows: int, cols: int) -> Tensor:
        found: Tensor = material.weight(qtype, rows, cols, seed=rows)[0].cpu()
        return found

    def packed(qtype: str, *shape: int) -> PackedWeight:
        cols = torch.Size(shape[1:]).numel()
        return repack(blocks(qtype, shape[0], cols), qtype, shape, tap_major=len(shape) == 4)

    f32 = torch.float32
    x, pictures = normal(2, 3, 64), last(2, 32, 5, 4)
    wide = normal(2, 7, 3 * 32, dtype=torch.bfloat16).view(2, 7, 3, 2, 16).permute(2, 0, 3, 1, 4)
    bias, small = normal(64), blocks("Q8_0", 8, 9 * 32)
    conv = (last(2, 32, 6, 5, dtype=f32), small, "Q8_0", (8, 32, 3, 3), normal(8, dtype=f32))
    added = {"residual": last(2, 64, 3, 2), "emb": normal(2, 96)[:, 32:]}

    def pair(name: str, module: Any, *args: Any, **keywords: Any) -> Call:
        return getattr(custom_ops, name), getattr(module, name), args, keywords

    multiply = partial(pair, "linear_packed", dispatch)
    return {
        "linear": pair("linear", ops, normal(3, 64, dtype=f32), blocks("Q4_0", 8, 64), "Q4_0", normal(8)),
        "linear_geglu": pair("linear_geglu", ops, normal(3, 32, dtype=torch.bfloat16), blocks("Q5_1", 8, 32), "Q5_1"),
        "conv2d": pair("conv2d", ops, *conv, 2, 1, tap_major=True),
        "conv2d of contiguous": pair("conv2d", ops, conv[0].contiguous(), *conv[1:], 1, 1, tap_major=False),
        "linear_packed": multiply(x, packed("Q4_1", 64, 64), bias, normal(2, 3, 64), mode="fused"),
        "linear_packed geglu": multiply(x, packed("Q8_0", 64, 64), geglu=True, mode="dequantize"),
        "linear_packed int8": multiply(x, packed("Q4_0", 64, 64), bias, mode="int8"),
        "conv2d_packed": pair(
            "conv2d_packed", dispatch, pictures, packed("Q4_0", 64, 32, 3, 3), bias, 2, 1, **added, mode="fused"
        ),
        "conv2d_packed decoded": pair(
            "conv2d_packed", dispatch, pictures.contiguous(), packed("Q8_0", 8, 32, 3, 3), padding=1, mode="dequantize"
        ),
        "group_norm_silu": pair("group_norm_silu", dispatch, pictures, 4, normal(32), normal(32), 1e-5, True),
        "layer_norm": pair("layer_norm", dispatch, x[:, 1:], bias, bias, 1e-5),
        "attention": pair("attention", ops, *wide.unbind()),
    }  # fmt: skip


NAMES = (
    "linear", "linear_geglu", "conv2d", "conv2d of contiguous", "linear_packed", "linear_packed geglu",
    "linear_packed int8", "conv2d_packed", "conv2d_packed decoded", "group_norm_silu", "layer_norm", "attention",
)  # fmt: skip


class Seen(TorchDispatchMode):
    """Notes our operators, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == NAMESPACE:
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", NAMES)
def test_operators_are_as_torch_wants_them(name: str, calls: dict[str, Call]) -> None:
    """And give what the plain functions give, to the bit."""
    function, plain, args, keywords = calls[name]
    with Seen() as seen:
        got = function(*args, **keywords)
    want = plain(*args, **keywords)
    assert torch.equal(got, want)
    assert got.dtype == want.dtype
    ((operator, operands),) = seen.calls
    torch.library.opcheck(operator, operands, test_utils=CHECKED)


def test_every_operator_is_checked(calls: dict[str, Call]) -> None:
    assert set(NAMES) == set(calls)
    defined = {name.removeprefix(f"{NAMESPACE}::").partition(".")[0] for name in custom_ops._library._op_defs}
    with Seen() as seen:
        for function, _, args, keywords in calls.values():
            function(*args, **keywords)
    assert {operator._schema.name.removeprefix(f"{NAMESPACE}::") for operator, _ in seen.calls} == defined


@pytest.mark.parametrize("name", ["conv2d", "conv2d of contiguous", "conv2d_packed", "conv2d_packed decoded"])
def test_pictures_come_channels_last(name: str, calls: dict[str, Call]) -> None:
    function, _, args, keywords = calls[name]
    assert function(*args, **keywords).is_contiguous(memory_format=torch.channels_last)


def test_what_does_not_fit_is_said_as_ever(material: Any) -> None:
    with pytest.raises(ValueError, match="does not end in the weight's 64 inputs"):
        custom_ops.linear(normal(3, 32), material.weight("Q8_0", 8, 64, seed=0)[0].cpu(), "Q8_0")
