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
from gguf_sd_kernels.checks import conv_product, linear_key, linear_product
from gguf_sd_kernels.cpu.activation import geglu as apply_geglu
from gguf_sd_kernels.cpu.scratch import borrow
from gguf_sd_kernels.reference import products as reference
from gguf_sd_kernels.repack import PackedWeight, unpack
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
    key = mode, geglu, *linear_key(x, weight, bias, residual)
    run = _linears.get(key)
    if run is None:
        run = _linears.keep(key, _prepare_linear(x, weight, bias, residual, geglu, mode))
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
        return partial(_triton("int8").linear_int8, geglu=geglu, launch=way.launch)
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
    added = _added(bias=bias, residual=residual, emb=emb)
    key = mode, stride, padding, weight.kind, x.device, x.dtype, x.shape, added
    way = _ways.get(key)
    if way is None:
        batch, channels, height, width = x.shape
        product = conv_product(x, weight, stride, padding)
        use = Use(product, added, (batch, channels, height, width), stride, padding, weight.tap_major)
        way = way_of(use, weight, x.dtype, mode)
        _ways.keep(key, way)
    if way.launch is not None:
        convolve = _triton("int8").conv2d_int8 if way.name == "int8" else _triton("conv").conv2d_fused
        return convolve(x, weight, bias, stride, padding, residual=residual, emb=emb, launch=way.launch)
    x = x.contiguous(memory_format=torch.channels_last)
    with borrow((weight.rows, weight.cols), x.dtype, x.device) as buffer:
        full = _decoded(weight, x.dtype, buffer, way)
        y = F.conv2d(x, full, None if bias is None else bias.to(x.dtype), stride, padding)
    if emb is not None:
        y += emb[:, :, None, None]
    return y if residual is None else y.add_(residual)


_ways: Prepared[Way] = Prepared()


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
    key = x.device, x.dtype, x.shape, groups, silu
    way = _group_norms.get(key) or _group_norms.keep(key, group_norm_way(x, groups, silu))
    if way == "torch":
        return ops.group_norm_silu(x, groups, weight, bias, eps, silu)
    return _triton("norm").group_norm_silu_triton(x, groups, weight, bias, eps, silu, way == "whole")


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """As :func:`gguf_sd_kernels.triton.norm.layer_norm_triton`, which makes it unless it is set aside."""
    key = x.device, x.dtype, x.shape[-1]
    if key not in _layer_norms:
        _layer_norms.keep(key, layer_norm_trusted(x))
    if not _layer_norms[key]:
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    return _triton("norm").layer_norm_triton(x, weight, bias, eps)


_group_norms: Prepared[str] = Prepared()
_layer_norms: Prepared[bool] = Prepared()
