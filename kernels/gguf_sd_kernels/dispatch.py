"""Products with packed weights on a GPU, and norms: which of the ways to make them is taken.

"fused" decodes inside the product, "dequantize" decodes into scratch memory and calls cuBLAS or cuDNN, "auto" takes
the faster by what was measured on this GPU (:func:`gguf_sd_kernels.tuning.launch.load_measured`). "int8" quantises the
activations too: never "auto"'s choice, as it changes the result. A kernel that is wrong on this GPU is not used: see
:mod:`gguf_sd_kernels.tuning.ways`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gguf_sd_kernels import ops
from gguf_sd_kernels.checks import conv_key, conv_product, conv_sizes, described, linear_key, linear_product
from gguf_sd_kernels.cpu.activation import geglu as apply_geglu
from gguf_sd_kernels.cpu.scratch import borrow
from gguf_sd_kernels.reference import products as reference
from gguf_sd_kernels.repack import PackedWeight, unpack
from gguf_sd_kernels.triton.launcher import with_rows
from gguf_sd_kernels.tuning.launch import Prepared
from gguf_sd_kernels.tuning.operands import Use
from gguf_sd_kernels.tuning.self_check import Subject
from gguf_sd_kernels.tuning.verdicts import trusted
from gguf_sd_kernels.tuning.ways import MODES, UNMEASURED, Way, group_norm_way, layer_norm_trusted, way_of

__all__ = ["MODES", "UNMEASURED", "conv2d_packed", "decode_packed", "group_norm_silu", "layer_norm", "linear_packed"]


@cache
def _triton(name: str) -> Any:
    """One of our modules of Triton kernels; Triton is imported when the first product needs it."""
    return import_module(f"gguf_sd_kernels.triton.{name}")


def linear_packed(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    geglu: bool = False,
    mode: str = "auto",
) -> Tensor:
    """``x @ W.T + bias + residual``, or with ``geglu`` ``value * gelu(gate)`` of its halves, ``x [..., K]``.

    ``mode`` is one of MODES; "int8" becomes "fused" for what it cannot do: Q4_1, and GPUs without it; "fused" becomes
    "dequantize" for float32, and GPUs without tensor cores that Triton uses.
    Raises ValueError for another mode, or shapes that do not fit.
    """
    key = linear_key(mode, geglu, x, weight, bias, residual)
    run = _linears.get(key) or _linears.keep(key, _prepare_linear(x, weight, bias, residual, geglu, mode))
    return run(x, weight, bias, residual)


LinearRun = Callable[[Tensor, PackedWeight, Tensor | None, Tensor | None], Tensor]
_linears: Prepared[LinearRun] = Prepared()


def _prepare_linear(
    x: Tensor, weight: PackedWeight, bias: Tensor | None, residual: Tensor | None, geglu: bool, mode: str
) -> LinearRun:
    """What makes such products from now on."""
    use = Use(linear_product(x, weight, geglu), _added(bias=bias, residual=residual))
    way = way_of(use, weight, x.dtype, mode)
    if way.name == "int8":
        return _triton("int8").PreparedInt8.linear(x, weight, bias, residual, geglu, way.launch)
    if way.name == "fused":
        return _triton("linear").PreparedLinear(x, weight, bias, residual, geglu, way.launch)
    if geglu and residual is not None:
        raise ValueError("GEGLU takes no residual")
    return partial(_linear_decoded, geglu=geglu, way=way)


def _linear_decoded(
    x: Tensor, weight: PackedWeight, bias: Tensor | None, residual: Tensor | None, geglu: bool, way: Way
) -> Tensor:
    rows, cols = weight.rows, weight.cols
    with borrow((rows, cols), x.dtype, x.device) as buffer:
        full = _decoded(weight, x.dtype, buffer, way)
        y = F.linear(x, full.reshape(rows, cols), None if bias is None else bias.to(x.dtype))
    if geglu:
        return apply_geglu(y)
    return y if residual is None else y.add_(residual)


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
    """Convolves ``x [B, IC, H, W]`` -> ``[B, OC, OH, OW]``; adds ``bias [OC]``, ``emb [B, OC]`` and ``residual``.

    ``mode`` is one of MODES, as for :func:`linear_packed`; blocks in (IC, KH, KW) order, and channels that are no
    multiple of 32, are dequantized in any. Raises ValueError for another mode, or shapes that do not fit.
    """
    emb, shifts = with_rows(emb), (stride, padding)
    key = conv_key(mode, shifts, x, weight, bias, residual, emb)
    run = _convs.get(key) or _convs.keep(key, _prepare_conv(x, weight, bias, shifts, residual, emb, mode))
    return run(x, weight, bias, residual, emb)


ConvRun = Callable[[Tensor, PackedWeight, Tensor | None, Tensor | None, Tensor | None], Tensor]
_convs: Prepared[ConvRun] = Prepared()


def _prepare_conv(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    shifts: tuple[int, int],
    residual: Tensor | None,
    emb: Tensor | None,
    mode: str,
) -> ConvRun:
    """What makes such convolutions from now on."""
    batch, channels, height, width = x.shape
    added = _added(bias=bias, residual=residual, emb=emb)
    use = Use(conv_product(x, weight, *shifts), added, (batch, channels, height, width), *shifts, weight.tap_major)
    way = way_of(use, weight, x.dtype, mode)
    if way.launch is None:
        return partial(_conv_decoded, shifts=shifts, way=way)
    sizes = conv_sizes(x, weight, bias, *shifts, residual=residual, emb=emb)
    if way.name == "int8":
        return _triton("int8").PreparedInt8.conv(sizes, x, way.launch)
    return _triton("conv").PreparedConv(sizes, x, way.launch)


def _conv_decoded(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    emb: Tensor | None,
    shifts: tuple[int, int],
    way: Way,
) -> Tensor:
    x = x.contiguous(memory_format=torch.channels_last)
    with borrow((weight.rows, weight.cols), x.dtype, x.device) as buffer:
        full = _decoded(weight, x.dtype, buffer, way)
        y = F.conv2d(x, full, None if bias is None else bias.to(x.dtype), *shifts)
    if emb is not None:
        y += emb[:, :, None, None]
    return y if residual is None else y.add_(residual)


def _added(**operands: Tensor | None) -> tuple[str, ...]:
    return tuple(name for name, operand in operands.items() if operand is not None)


def decode_packed(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """The weight in ``weight.shape`` and ``dtype``: by our kernel, or where that is set aside by plain torch."""
    decoder = Subject.of_decoder(weight.qtype, dtype, weight.shape, weight.tap_major)
    way = Way("dequantize" if trusted(decoder, weight.device) else "torch")
    return _decoded(weight, dtype, torch.empty(weight.rows, weight.cols, dtype=dtype, device=weight.device), way)


def _decoded(weight: PackedWeight, dtype: torch.dtype, buffer: Tensor, way: Way) -> Tensor:
    """The weight decoded into ``buffer``, in ``weight.shape``."""
    if way.name == "dequantize":
        return _triton("dequantize").dequantize_packed(weight, dtype, buffer)
    blocks = unpack(weight)
    if len(weight.shape) == 2:
        return reference.dequantize(blocks, weight.qtype, dtype, buffer)
    oc, ic, kh, kw = weight.shape
    return reference.conv_weight(blocks, weight.qtype, (oc, ic, kh, kw), dtype, buffer, tap_major=weight.tap_major)


def group_norm_silu(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool) -> Tensor:
    """As :func:`gguf_sd_kernels.triton.norm.group_norm_silu_triton`, which makes it unless it is set aside."""
    key = groups, eps, silu, x.device, x.dtype, x.shape, described(weight), described(bias)
    run = _norms.get(key)
    if run is None:
        way = group_norm_way(x, groups, silu)
        if way == "torch":
            run = partial(_plain_group_norm, groups=groups, eps=eps, silu=silu)
        else:
            run = _triton("norm").PreparedGroupNorm(x, groups, weight, bias, eps, silu, way == "whole")
        _norms.keep(key, run)
    return run(x, weight, bias)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """As :func:`gguf_sd_kernels.triton.norm.layer_norm_triton`, which makes it unless it is set aside."""
    key = eps, x.device, x.dtype, x.shape, described(weight), described(bias)
    run = _norms.get(key)
    if run is None:
        trusted = layer_norm_trusted(x)
        run = (
            _triton("norm").PreparedLayerNorm(x, weight, bias, eps) if trusted else partial(_plain_layer_norm, eps=eps)
        )
        _norms.keep(key, run)
    return run(x, weight, bias)


_norms: Prepared[Callable[[Tensor, Tensor, Tensor], Tensor]] = Prepared()


def _plain_group_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
    return ops.group_norm_silu(x, groups, weight, bias, eps, silu)


def _plain_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, eps)
