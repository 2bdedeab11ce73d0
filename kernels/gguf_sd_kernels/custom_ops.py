"""What torch cannot trace, as operators of torch's library ``gguf_sd``: for torch.compile and torch.export.

Products decode into scratch memory, launch Triton kernels and remember what was prepared: opaque to torch.compile,
which takes each for one operator and asks its fake for shape, dtype and memory format. The functions here take what
their namesakes in :mod:`gguf_sd_kernels.ops` and :mod:`gguf_sd_kernels.dispatch` take, and are called in their place
while torch traces: an operator costs some 5 microseconds a call, which plain calls are spared. Made for inference:
no gradients pass. Import this module before a program that ``torch.export.save`` wrote is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gguf_sd_kernels import dispatch, ops
from gguf_sd_kernels.repack import PackedWeight

NAMESPACE = "gguf_sd"
_library = torch.library.Library(NAMESPACE, "DEF")
_PACKED = "Tensor quants, Tensor scales, Tensor? mins, str qtype"


def _operator(schema: str, run: Callable[..., Tensor], fake: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Defines an operator that ``run`` computes, whose results are laid out as ``fake``'s, ``schema`` without the type
    of its result; returns what calls it."""
    name = schema.partition("(")[0]
    _library.define(f"{schema} -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    called: Callable[..., Tensor] = getattr(getattr(torch.ops, NAMESPACE), name).default
    return called


def _run_linear(x: Tensor, blocks: Tensor, qtype: str, bias: Tensor | None, geglu: bool) -> Tensor:
    return (ops.linear_geglu if geglu else ops.linear)(x, blocks, qtype, bias).contiguous()


def _fake_linear(x: Tensor, blocks: Tensor, qtype: str, bias: Tensor | None, geglu: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], blocks.shape[0] // (2 if geglu else 1))


_linear = _operator(
    "linear(Tensor x, Tensor blocks, str qtype, Tensor? bias, bool geglu)",
    _run_linear,
    _fake_linear,
)


def linear(x: Tensor, blocks: Tensor, qtype: str, bias: Tensor | None = None) -> Tensor:
    """As :func:`gguf_sd_kernels.ops.linear`."""
    return _linear(x, blocks, qtype, bias, False)


def linear_geglu(x: Tensor, blocks: Tensor, qtype: str, bias: Tensor | None = None) -> Tensor:
    """As :func:`gguf_sd_kernels.ops.linear_geglu`."""
    return _linear(x, blocks, qtype, bias, True)


def _fake_pictures(x: Tensor, shape: Sequence[int], stride: int, padding: int) -> Tensor:
    out, _, kh, kw = shape
    oh, ow = ((size + 2 * padding - taps) // stride + 1 for size, taps in ((x.shape[2], kh), (x.shape[3], kw)))
    return x.new_empty(x.shape[0], out, oh, ow).to(memory_format=torch.channels_last)


def _run_conv2d(
    x: Tensor,
    blocks: Tensor,
    qtype: str,
    shape: Sequence[int],
    bias: Tensor | None,
    stride: int,
    padding: int,
    tap_major: bool,
) -> Tensor:
    out, channels, kh, kw = shape
    y = ops.conv2d(x, blocks, qtype, (out, channels, kh, kw), bias, stride, padding, tap_major=tap_major)
    return y.contiguous(memory_format=torch.channels_last)


_conv2d = _operator(
    "conv2d(Tensor x, Tensor blocks, str qtype, int[] shape, Tensor? bias, int stride, int padding, bool tap_major)",
    _run_conv2d,
    lambda x, blocks, qtype, shape, bias, stride, padding, tap_major: _fake_pictures(x, shape, stride, padding),
)


def conv2d(
    x: Tensor,
    blocks: Tensor,
    qtype: str,
    shape: tuple[int, int, int, int],
    bias: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    *,
    tap_major: bool,
) -> Tensor:
    """As :func:`gguf_sd_kernels.ops.conv2d`; the result is channels-last."""
    return _conv2d(x, blocks, qtype, shape, bias, stride, padding, tap_major)


def _run_linear_packed(
    x: Tensor,
    quants: Tensor,
    scales: Tensor,
    mins: Tensor | None,
    qtype: str,
    cols: int,
    bias: Tensor | None,
    residual: Tensor | None,
    geglu: bool,
    mode: str,
) -> Tensor:
    weight = PackedWeight(quants, scales, mins, qtype, (quants.shape[0], cols))
    return dispatch.linear_packed(x, weight, bias, residual, geglu=geglu, mode=mode).contiguous()


def _fake_linear_packed(x: Tensor, quants: Tensor, *rest: Any) -> Tensor:
    *_, geglu, _ = rest
    return x.new_empty(*x.shape[:-1], quants.shape[0] // (2 if geglu else 1))


_linear_packed = _operator(
    f"linear_packed(Tensor x, {_PACKED}, int cols, Tensor? bias, Tensor? residual, bool geglu, str mode)",
    _run_linear_packed,
    _fake_linear_packed,
)


def linear_packed(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    geglu: bool = False,
    mode: str = "auto",
) -> Tensor:
    """As :func:`gguf_sd_kernels.dispatch.linear_packed`."""
    arrays = weight.quants, weight.scales, weight.mins
    return _linear_packed(x, *arrays, weight.qtype, weight.cols, bias, residual, geglu, mode)


def _run_conv2d_packed(
    x: Tensor,
    quants: Tensor,
    scales: Tensor,
    mins: Tensor | None,
    qtype: str,
    shape: Sequence[int],
    tap_major: bool,
    bias: Tensor | None,
    stride: int,
    padding: int,
    residual: Tensor | None,
    emb: Tensor | None,
    mode: str,
) -> Tensor:
    weight = PackedWeight(quants, scales, mins, qtype, tuple(shape), tap_major)
    y = dispatch.conv2d_packed(x, weight, bias, stride, padding, residual=residual, emb=emb, mode=mode)
    return y.contiguous(memory_format=torch.channels_last)


def _fake_conv2d_packed(x: Tensor, *rest: Any) -> Tensor:
    _, _, _, _, shape, _, _, stride, padding, *_ = rest
    return _fake_pictures(x, shape, stride, padding)


_conv2d_packed = _operator(
    f"conv2d_packed(Tensor x, {_PACKED}, int[] shape, bool tap_major, Tensor? bias, int stride, int padding, "
    "Tensor? residual, Tensor? emb, str mode)",
    _run_conv2d_packed,
    _fake_conv2d_packed,
)


def conv2d_packed(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    *,
    residual: Tensor | None = None,
    emb: Tensor | None = None,
    mode: str = "auto",
) -> Tensor:
    """As :func:`gguf_sd_kernels.dispatch.conv2d_packed`; the result is channels-last."""
    arrays = weight.quants, weight.scales, weight.mins
    kind = weight.qtype, weight.shape, weight.tap_major
    return _conv2d_packed(x, *arrays, *kind, bias, stride, padding, residual, emb, mode)


group_norm_silu = _operator(
    "group_norm_silu(Tensor x, int groups, Tensor weight, Tensor bias, float eps, bool silu)",
    lambda x, *rest: dispatch.group_norm_silu(x, *rest).contiguous(memory_format=torch.channels_last),
    lambda x, *rest: x.new_empty(x.shape).to(memory_format=torch.channels_last),
)
layer_norm = _operator(
    "layer_norm(Tensor x, Tensor weight, Tensor bias, float eps)",
    lambda x, *rest: dispatch.layer_norm(x, *rest).contiguous(),
    lambda x, *rest: x.new_empty(x.shape),
)


def _by_tokens(q: Tensor) -> Tensor:
    """Memory for ``[B, H, N, D]`` in which a token's heads lie side by side."""
    batch, heads, queries, head_dim = q.shape
    return q.new_empty(batch, queries, heads, head_dim).transpose(1, 2)


attention = _operator(
    "attention(Tensor q, Tensor k, Tensor v)",
    lambda q, k, v: ops.attention(q, k, v).transpose(1, 2).contiguous().transpose(1, 2),
    lambda q, k, v: _by_tokens(q),
)
