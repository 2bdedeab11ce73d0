"""Products with packed weights on a GPU: which of the ways to make them is taken.

"fused" decodes inside the product, "dequantize" decodes into scratch memory and calls cuBLAS or cuDNN, "auto" takes
the faster by what was measured on this GPU (:func:`gguf_sd_kernels.tuning.launch.load_measured`). "int8" quantises the
activations too: never "auto"'s choice, as it changes the result.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gguf_sd_kernels.checks import DTYPES, conv_product, linear_key, linear_product
from gguf_sd_kernels.cpu.activation import geglu as apply_geglu
from gguf_sd_kernels.cpu.scratch import borrow
from gguf_sd_kernels.devices import gpu_of
from gguf_sd_kernels.repack import PackedWeight
from gguf_sd_kernels.tuning.launch import Prepared, Product, measured
from gguf_sd_kernels.tuning.launch_int8 import int8_supported

MODES = ("auto", "fused", "dequantize", "int8")
# What "auto" does with a product that nobody measured. Not itself measured: arithmetic says that decoding first
# costs a quarter of an SD 1.5 step and three quarters of an SDXL step at 512 pixels on the fastest cards.
UNMEASURED = "fused"


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
    way = _way(x, weight, linear_product(x, weight, geglu), mode)
    if way == "int8":
        return partial(_triton("int8").linear_int8, geglu=geglu)
    if way == "fused":
        return _triton("linear").PreparedLinear(x, weight, bias, residual, geglu)
    if geglu and residual is not None:
        raise ValueError("GEGLU takes no residual")
    return partial(_linear_decoded, geglu=geglu)


def _linear_decoded(
    x: Tensor, weight: PackedWeight, bias: Tensor | None, residual: Tensor | None, geglu: bool
) -> Tensor:
    rows, cols = weight.rows, weight.cols
    with borrow((rows, cols), x.dtype, x.device) as buffer:
        full = _triton("dequantize").dequantize_packed(weight, x.dtype, buffer)
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
    key = mode, stride, padding, weight.kind, x.device, x.dtype, x.shape
    way = _ways.get(key) or _ways.keep(key, _way(x, weight, conv_product(x, weight, stride, padding), mode))
    if way == "int8":
        return _triton("int8").conv2d_int8(x, weight, bias, stride, padding, residual=residual, emb=emb)
    if way == "fused":
        return _triton("conv").conv2d_fused(x, weight, bias, stride, padding, residual=residual, emb=emb)
    x = x.contiguous(memory_format=torch.channels_last)
    with borrow((weight.rows, weight.cols), x.dtype, x.device) as buffer:
        full = _triton("dequantize").dequantize_packed(weight, x.dtype, buffer)
        y = F.conv2d(x, full, None if bias is None else bias.to(x.dtype), stride, padding)
    if emb is not None:
        y += emb[:, :, None, None]
    return y if residual is None else y.add_(residual)


_ways: Prepared[str] = Prepared()


def _way(x: Tensor, weight: PackedWeight, product: Product, mode: str) -> str:
    """How ``product`` is made: "fused", "int8" or "dequantize"."""
    if mode not in MODES:
        raise ValueError(f"no mode {mode!r} for packed weights; choose from {', '.join(MODES)}")
    in_order = weight.tap_major or product.taps == 1
    if product.op == "conv" and not (in_order and weight.shape[1] % 32 == 0):
        return "dequantize"
    gpu = gpu_of(x.device)
    if x.dtype not in DTYPES or gpu.family is None:
        return "dequantize"
    if mode == "int8":
        return "int8" if int8_supported(weight, x.device) else "fused"
    if mode == "auto":
        known = measured(product, gpu)
        return known.fastest if known else UNMEASURED
    return mode
