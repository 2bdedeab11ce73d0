"""Operators on the meta device that only allocate their results, as an operator on a GPU does before it launches.

torch computes the shapes of most results on the meta device in Python, at 50 to 300 microseconds an operator, ten times
what a GPU's operators cost. With these in their place, the time of a step on the meta device is about its host's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F


def _like(x: Tensor, *rest: object, **options: object) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)


def _wider(x: Tensor, y: Tensor | float, **options: object) -> Tensor:
    shape = torch.broadcast_shapes(x.shape, y.shape) if isinstance(y, Tensor) else x.shape
    return _like(x) if shape == x.shape else torch.empty(shape, dtype=x.dtype, device=x.device)


def _layout(x: Tensor) -> torch.memory_format:
    pictures = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if pictures else torch.contiguous_format


def _cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    first, shape = tensors[0], list(tensors[0].shape)
    shape[dim] = sum(tensor.shape[dim] for tensor in tensors)
    return torch.empty(shape, dtype=first.dtype, device=first.device, memory_format=_layout(first))


def _mm(x: Tensor, y: Tensor, **options: object) -> Tensor:
    return torch.empty((x.shape[0], y.shape[1]), dtype=x.dtype, device=x.device)


def _addmm(bias: Tensor, x: Tensor, y: Tensor, **options: object) -> Tensor:
    return _mm(x, y)


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, *rest: object) -> Tensor:
    sizes = ((x.shape[i + 2] + 2 * padding[i] - weight.shape[i + 2]) // stride[i] + 1 for i in (0, 1))
    shape = (x.shape[0], weight.shape[0], *sizes)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_layout(x))


def _nearest(x: Tensor, size: Sequence[int], *rest: object) -> Tensor:
    return torch.empty((*x.shape[:2], *size), dtype=x.dtype, device=x.device, memory_format=_layout(x))


def _group_norm(x: Tensor, weight: Tensor, bias: Tensor, n: int, c: int, hw: int, groups: int, eps: float) -> Any:
    return _like(x), torch.empty((n, groups), device=x.device), torch.empty((n, groups), device=x.device)


def _layer_norm(x: Tensor, shape: Any, weight: Tensor, bias: Tensor, eps: float) -> Any:
    return _like(x), torch.empty(x.shape[:-1], device=x.device), torch.empty(x.shape[:-1], device=x.device)


OPERATORS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("silu", "gelu", "exp", "cos", "sin"), _like),
    **dict.fromkeys(("add.Tensor", "mul.Tensor", "div.Tensor"), _wider),
    "cat": _cat,
    "mm": _mm,
    "addmm": _addmm,
    "convolution": _convolution,
    "upsample_nearest2d": _nearest,
    "native_group_norm": _group_norm,
    "native_layer_norm": _layer_norm,
}


def _attention(q: Tensor, k: Tensor, v: Tensor, *rest: object, **options: object) -> Tensor:
    """Laid out as CUDA's results are: heads of a token side by side."""
    batch, heads, tokens, width = q.shape
    return torch.empty((batch, tokens, heads, width), dtype=q.dtype, device=q.device).transpose(1, 2)


@contextmanager
def light_meta() -> Iterator[Counter[str]]:
    """Puts OPERATORS and scaled dot products in the place of torch's, on the meta device, within the block; yields how
    often each is called."""
    calls: Counter[str] = Counter()

    def counted(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            calls[name] += 1
            return kernel(*arguments, **options)

        return call

    library = torch.library.Library("aten", "IMPL", "Meta")
    try:
        for name, kernel in OPERATORS.items():
            library.impl(name, counted(name.partition(".")[0], kernel), allow_override=True)
        with patch.object(F, "scaled_dot_product_attention", counted("attention", _attention)):
            yield calls
    finally:
        library._destroy()
