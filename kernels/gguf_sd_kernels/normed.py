"""Linear layers around a layer norm: one leaves the statistics of its result's rows, the next normalises by those.

Where a mode takes another kernel for one of them, or it is set aside on this GPU, the norm is a launch of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from gguf_sd_kernels.checks import linear_key, linear_product
from gguf_sd_kernels.dispatch import decode_packed, linear_packed
from gguf_sd_kernels.repack import PackedWeight
from gguf_sd_kernels.row_parts import FoldedNorm, RowParts, decoded_dtype
from gguf_sd_kernels.tuning.launch import Prepared
from gguf_sd_kernels.tuning.operands import Use
from gguf_sd_kernels.tuning.ways import fused_launch

if TYPE_CHECKING:
    from gguf_sd_kernels.triton.linear import PreparedLinear

_measured: Prepared[tuple[PreparedLinear | None]] = Prepared()
_normed: Prepared[tuple[PreparedLinear | None]] = Prepared()


class Measured(NamedTuple):
    """Rows ``[..., C]``, and the parts of them that a norm behind takes, where they are known."""

    rows: Tensor
    parts: RowParts | None


def linear_measured(
    x: Tensor, weight: PackedWeight, bias: Tensor | None, residual: Tensor | None, mode: str
) -> Measured:
    """As :func:`gguf_sd_kernels.dispatch.linear_packed`, for a result that is to be normalised."""
    key = linear_key(mode, False, x, weight, bias, residual)
    (run,) = _measured.get(key) or _measured.keep(key, (_prepare_measured(x, weight, bias, residual, mode),))
    if run is None:
        return Measured(linear_packed(x, weight, bias, residual, mode=mode), None)
    return Measured(*run.measured(x, weight, bias, residual))


def _prepare_measured(
    x: Tensor, weight: PackedWeight, bias: Tensor | None, residual: Tensor | None, mode: str
) -> PreparedLinear | None:
    added = tuple(name for name, operand in (("bias", bias), ("residual", residual)) if operand is not None)
    use = Use(linear_product(x, weight, False), (*added, "parts"))
    launch = fused_launch(use, weight, x.dtype, mode)
    if launch is None:
        return None
    from gguf_sd_kernels.triton.linear import PreparedLinear

    return PreparedLinear(x, weight, bias, residual, False, launch)


def normed_linear(
    x: Tensor, parts: RowParts, weight: PackedWeight, bias: Tensor | None, eps: float, *, geglu: bool, mode: str
) -> PreparedLinear | None:
    """What normalises ``x [..., K]`` and multiplies it in one launch, see
    :meth:`gguf_sd_kernels.triton.linear.PreparedLinear.normed`; None where two are needed."""
    key = linear_key((mode, eps, parts.width), geglu, x, weight, bias, None)
    (run,) = _normed.get(key) or _normed.keep(key, (_prepare_normed(x, parts, weight, bias, eps, geglu, mode),))
    return run


def _prepare_normed(
    x: Tensor, parts: RowParts, weight: PackedWeight, bias: Tensor | None, eps: float, geglu: bool, mode: str
) -> PreparedLinear | None:
    use = Use(linear_product(x, weight, geglu), ("norm",) if bias is None else ("bias", "norm"))
    launch = fused_launch(use, weight, x.dtype, mode) if parts.joinable else None
    if launch is None:
        return None
    from gguf_sd_kernels.triton.linear import PreparedLinear

    return PreparedLinear(x, weight, bias, None, geglu, launch, normed=(parts, eps))


def fold(
    weight: PackedWeight, bias: Tensor | None, norm_weight: Tensor, norm_bias: Tensor, eps: float, dtype: torch.dtype
) -> FoldedNorm:
    """A layer norm and the linear layer behind it, for activations of ``dtype``."""
    return FoldedNorm.of(decode_packed(weight, decoded_dtype(dtype)), bias, norm_weight, norm_bias, eps, dtype)
