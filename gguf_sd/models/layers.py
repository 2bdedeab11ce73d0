"""Linears and convolutions, with weights in full or in quantised blocks, and norms: thin modules over the kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from gguf_sd.checkpoint.quant_tensor import QuantTensor
from gguf_sd.models.members import parameter
from gguf_sd_kernels import custom_ops, dispatch, ops
from gguf_sd_kernels.cpu import enlarged
from gguf_sd_kernels.dispatch import conv2d_packed, linear_packed
from gguf_sd_kernels.enlarged import conv2d_enlarged
from gguf_sd_kernels.normed import Measured, fold, linear_measured, normed_linear
from gguf_sd_kernels.repack import PACKED_TYPES, PackedWeight, repack, unpack
from gguf_sd_kernels.row_parts import FoldedNorm


class PointwiseForward:
    """Mixin for linears that are 1x1 convolutions: runs on [B, C, H, W] through its channels-last view."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        last = None if residual is None else residual.permute(0, 2, 3, 1)
        return super().forward(x.permute(0, 2, 3, 1), last).permute(0, 3, 1, 2)  # type: ignore[misc]


class AroundNorm:
    """Mixin for linears that a layer norm follows or precedes: here that is a module of its own."""

    def measured(self, x: Tensor, residual: Tensor | None = None) -> Measured:
        """The layer's result, which is to be normalised."""
        return Measured(self(x, residual), None)  # type: ignore[operator]

    def after_norm(self, norm: LayerNorm, x: Measured, geglu: bool = False) -> Tensor:
        """The layer, with GEGLU if ``geglu``, of norm(x)."""
        rows = norm(x.rows)
        return self.geglu(rows) if geglu else self(rows)  # type: ignore[attr-defined,operator]

    def of_map(self, norm: GroupNorm, x: Tensor) -> Measured:
        """The layer of the pixels of norm(x), x [B, C, H, W] channels-last -> [B, H*W, out], which is to be
        normalised."""
        return self.measured(norm(x).permute(0, 2, 3, 1).flatten(1, 2))


class AfterGroupNorm:
    """Mixin for convolutions behind a group norm, which is a module of its own here."""

    def normed(self, norm: GroupNorm, x: Tensor, emb: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """The layer of norm(x)."""
        y: Tensor = self(norm(x), emb=emb, residual=residual)  # type: ignore[operator]
        return y


class Linear(AroundNorm, nn.Linear):
    """y = x W^T + b, and what is to be added to it."""

    weight: nn.Parameter = parameter()
    bias: nn.Parameter = parameter()
    origins: tuple[str, ...] = ()  # the weights that its rows are, in order, where they stay in a file

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [..., in], residual [..., out] -> [..., out]."""
        y = ops.product(x, self.weight, self.bias)
        return y if residual is None else y.add_(residual)

    def geglu(self, x: Tensor) -> Tensor:
        """value * gelu(gate), the halves of y: x [..., in] -> [..., out / 2]."""
        return ops.product_geglu(x, self.weight, self.bias)


class Pointwise(PointwiseForward, Linear):
    """A 1x1 convolution, weight [out, in]."""


class Conv2d(AfterGroupNorm, nn.Conv2d):
    """A convolution with a square kernel, the same stride and padding both ways, and what is to be added to it."""

    weight: nn.Parameter = parameter()
    bias: nn.Parameter = parameter()

    def forward(self, x: Tensor, emb: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """x [B, C, H, W], emb [B, out] for every pixel, residual [B, out, H', W'] -> [B, out, H', W']."""
        assert not isinstance(self.padding, str)
        return added(ops.convolve(x, self.weight, self.bias, self.stride[0], self.padding[0]), emb, residual)

    def enlarged(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """The layer of x enlarged to ``size`` (H, W), by its nearest neighbours."""
        assert not isinstance(self.padding, str)
        if enlarged.pays(x, size, self.weight, self.stride[0], self.padding[0]):
            return enlarged.conv2d_enlarged(x, self.weight, self.bias)
        return self(nn.functional.interpolate(x, size=size))


def added(y: Tensor, emb: Tensor | None, residual: Tensor | None) -> Tensor:
    """y [B, C, H, W] with ``emb`` [B, C] added to every pixel, and ``residual`` [B, C, H, W]; in place."""
    if emb is not None:
        y = y.add_(emb[:, :, None, None])
    return y if residual is None else y.add_(residual)


class GroupNorm(nn.GroupNorm):
    """Group normalisation of [B, C, H, W], with SiLU applied to its result where ``silu``."""

    weight: nn.Parameter = parameter()
    bias: nn.Parameter = parameter()
    fused = False  # in Triton, one or two launches

    def __init__(self, groups: int, channels: int, eps: float, silu: bool = True):
        super().__init__(groups, channels, eps=eps)
        self.silu = silu

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            norm = custom_ops.group_norm_silu if is_compiling() else dispatch.group_norm_silu
            return norm(x, self.num_groups, self.weight, self.bias, self.eps, self.silu)
        return ops.group_norm_silu(x, self.num_groups, self.weight, self.bias, self.eps, self.silu)


class LayerNorm(nn.LayerNorm):
    """Layer normalisation of [..., C]."""

    weight: nn.Parameter = parameter()
    bias: nn.Parameter = parameter()
    fused = False  # in Triton, one launch

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            norm = custom_ops.layer_norm if is_compiling() else dispatch.layer_norm
            return norm(x, self.weight, self.bias, self.eps)
        return super().forward(x)


class Quantized(nn.Module):
    """Holds the blocks as a buffer, so that `.to(device)` moves them and `.to(dtype)` leaves them alone."""

    blocks: Tensor
    bias: Tensor | None = parameter()
    origins: tuple[str, ...] = ()  # as Linear's

    def __init__(self, weight: QuantTensor, bias: Tensor | None):
        super().__init__()
        self.register_buffer("blocks", weight.blocks)
        self.qtype, self.shape, self.tap_major = weight.qtype, weight.shape, weight.tap_major
        self.bias = bias
        self.packed: PackedWeight | None = None  # the blocks as the GPU kernels take them, in place of `blocks`
        self.folded: FoldedNorm | None = None  # with the norm before it, once it was met
        self.mode = ""

    @property
    def weight(self) -> QuantTensor:
        """The weight, still quantised."""
        blocks = self.blocks if self.packed is None else unpack(self.packed)
        return QuantTensor(blocks, self.qtype, self.shape, self.tap_major)

    def pack(self, mode: str) -> None:
        """Repacks the blocks for the GPU kernels, on the device where they are; the module stays there from now on.
        ``mode`` is one of gguf_sd_kernels.dispatch.MODES. Types without a kernel are left as they are."""
        if self.qtype in PACKED_TYPES:
            self.packed = repack(self.blocks, self.qtype, self.shape, tap_major=self.tap_major)
            self.mode, self.blocks, self.folded = mode, self.blocks.new_empty(0), None

    def extra_repr(self) -> str:
        return f"{self.qtype}, shape={list(self.shape)}, bias={self.bias is not None}"


class QuantLinear(AroundNorm, Quantized):
    """y = x W^T + b, with W [out, in] in blocks, and what is to be added to it."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [..., in], residual [..., out] -> [..., out]."""
        if self.packed is not None:
            multiply = custom_ops.linear_packed if is_compiling() else linear_packed
            return multiply(x, self.packed, self.bias, residual, mode=self.mode)
        y = (custom_ops if is_compiling() else ops).linear(x, self.blocks, self.qtype, self.bias)
        return y if residual is None else y.add_(residual)

    def geglu(self, x: Tensor) -> Tensor:
        """value * gelu(gate), the halves of y: x [..., in] -> [..., out / 2]."""
        if self.packed is not None:
            multiply = custom_ops.linear_packed if is_compiling() else linear_packed
            return multiply(x, self.packed, self.bias, geglu=True, mode=self.mode)
        return (custom_ops if is_compiling() else ops).linear_geglu(x, self.blocks, self.qtype, self.bias)

    def measured(self, x: Tensor, residual: Tensor | None = None) -> Measured:
        """As :class:`AroundNorm` has it, with what the norm takes where the kernels leave it."""
        if self.packed is None or is_compiling():
            return super().measured(x, residual)
        return _as_called(self, partial(linear_measured, x, self.packed, self.bias, residual, self.mode))

    def after_norm(self, norm: LayerNorm, x: Measured, geglu: bool = False) -> Tensor:
        """As :class:`AroundNorm` has it, in one launch where the kernels have one for it."""
        if x.parts is not None and self.packed is not None and norm.fused and not is_compiling():
            run = normed_linear(x.rows, x.parts, self.packed, self.bias, norm.eps, geglu=geglu, mode=self.mode)
            if run is not None:
                return run.normed(x.rows, self.packed, x.parts, self._fold(norm, x.rows))
        return super().after_norm(norm, x, geglu)

    def _fold(self, norm: LayerNorm, x: Tensor) -> FoldedNorm:
        assert self.packed is not None
        if self.folded is None or not self.folded.fits(x):
            self.folded = fold(self.packed, self.bias, norm.weight, norm.bias, norm.eps, x.dtype)
        return self.folded


class QuantPointwise(PointwiseForward, QuantLinear):
    """A 1x1 convolution with its weight in blocks."""


class QuantConv2d(AfterGroupNorm, Quantized):
    """A convolution with W [out, in, kh, kw] in blocks, and what is to be added to it."""

    def __init__(self, weight: QuantTensor, bias: Tensor | None, stride: int, padding: int):
        super().__init__(weight, bias)
        self.stride, self.padding = stride, padding

    def forward(self, x: Tensor, emb: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """x [B, C, H, W], emb [B, out] for every pixel, residual [B, out, H', W'] -> [B, out, H', W']."""
        if self.packed is not None:
            stride, padding = self.stride, self.padding
            convolve = custom_ops.conv2d_packed if is_compiling() else conv2d_packed
            return convolve(x, self.packed, self.bias, stride, padding, residual=residual, emb=emb, mode=self.mode)
        out, channels, kh, kw = self.shape
        y = (custom_ops if is_compiling() else ops).conv2d(
            x,
            self.blocks,
            self.qtype,
            (out, channels, kh, kw),
            self.bias,
            stride=self.stride,
            padding=self.padding,
            tap_major=self.tap_major,
        )
        return added(y, emb, residual)

    def enlarged(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """The layer of x enlarged to ``size`` (H, W), by its nearest neighbours; in one launch where the kernels have
        one for it."""
        if self.packed is None or self.stride != 1 or is_compiling():
            return self(nn.functional.interpolate(x, size=size))
        return conv2d_enlarged(x, self.packed, self.bias, size, self.padding, self.mode)


def _as_called(module: nn.Module, compute: Callable[[], Measured]) -> Measured:
    """What ``compute`` makes of the module's weights, between the hooks of a call: weights that are streamed come with
    one. Hooks are given nothing, and change nothing."""
    for before in module._forward_pre_hooks.values():
        before(module, ())
    result = compute()
    for after in module._forward_hooks.values():
        after(module, (), result)
    return result


def quantized(module: nn.Linear | nn.Conv2d, weight: QuantTensor) -> nn.Module:
    """The quantised counterpart of a linear, pointwise or convolution module; it takes over the bias."""
    if isinstance(module, nn.Conv2d):
        assert not isinstance(module.padding, str)
        return QuantConv2d(weight, module.bias, module.stride[0], module.padding[0])
    kind = QuantPointwise if isinstance(module, Pointwise) else QuantLinear
    return kind(weight, module.bias)


def stacked(linears: Sequence[nn.Module]) -> Linear | QuantLinear | None:
    """One linear that makes the outputs of several side by side, from weights below one another; None where they are
    not all plain, or all in blocks of one type. For linears of one input width, with or without biases, not packed."""
    joined = _stacked(linears)
    if joined is not None:
        joined.origins = tuple(origin for linear in linears for origin in linear.origins)  # type: ignore[union-attr]
    return joined


def _stacked(linears: Sequence[nn.Module]) -> Linear | QuantLinear | None:
    biases = [linear.bias for linear in linears if isinstance(linear.bias, Tensor)]
    if len(biases) not in (0, len(linears)):
        return None
    bias = nn.Parameter(torch.cat(biases), requires_grad=False) if biases else None
    if all(type(linear) is Linear for linear in linears):
        weight = torch.cat([linear.weight for linear in linears if isinstance(linear, Linear)])
        out, features = weight.shape
        with torch.device("meta"):
            joined = Linear(features, out, bias=False)
        joined.weight, joined.bias = nn.Parameter(weight, requires_grad=False), bias  # type: ignore[assignment]
        return joined
    weights = [linear.weight for linear in linears if isinstance(linear, QuantLinear)]
    if len(weights) < len(linears) or len({weight.qtype for weight in weights}) > 1:
        return None
    shape = (sum(weight.shape[0] for weight in weights), weights[0].shape[1])
    return QuantLinear(QuantTensor(torch.cat([weight.blocks for weight in weights]), weights[0].qtype, shape), bias)


def resident(module: Quantized, dtype: torch.dtype, triton: bool = False) -> nn.Module:
    """The full-precision counterpart, on the same device: the weight dequantised once, to ``dtype``; by Triton where
    asked for and possible."""
    if triton and module.qtype in PACKED_TYPES:
        packed = module.packed or repack(module.blocks, module.qtype, module.shape, tap_major=module.tap_major)
        decoded = dispatch.decode_packed(packed, dtype)
    else:
        decoded = module.weight.dequantize(dtype)
    weight = nn.Parameter(decoded, requires_grad=False)
    out, features = module.shape[:2]
    with torch.device("meta"):
        full: nn.Module
        if isinstance(module, QuantConv2d):
            full = Conv2d(features, out, module.shape[2], module.stride, module.padding)
        else:
            kind = Pointwise if isinstance(module, QuantPointwise) else Linear
            full = kind(features, out)
    full.weight, full.bias = weight, module.bias  # type: ignore[assignment]
    return full
