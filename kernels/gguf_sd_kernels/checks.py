"""What the products with packed weights take, checked, and the sizes of what they give."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from gguf_sd_kernels.repack import PackedWeight
from gguf_sd_kernels.tuning.launch import Product

DTYPES = (torch.float16, torch.bfloat16)
MAX_ELEMENTS = 2**31 - 1  # the kernels count in 32 bits


def described(tensor: Tensor | None) -> tuple[torch.Size, torch.dtype] | None:
    """What a launch that was prepared for ``tensor`` depends on, beside its device."""
    return None if tensor is None else (tensor.shape, tensor.dtype)


def linear_key(
    how: Hashable, geglu: bool, x: Tensor, weight: PackedWeight, bias: Tensor | None, residual: Tensor | None
) -> Hashable:
    """What a prepared linear layer depends on; ``how`` it is made is a mode, or a launch."""
    return how, geglu, weight.kind, x.device, x.dtype, x.shape, described(bias), described(residual)


def conv_key(
    how: Hashable,
    shifts: tuple[int, int],
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    emb: Tensor | None,
) -> Hashable:
    """What a prepared convolution depends on, ``shifts`` its stride and padding; ``how`` as for :func:`linear_key`."""
    rows = None if emb is None else (emb.shape, emb.dtype, emb.stride(0))
    return how, shifts, weight.kind, x.device, x.dtype, x.shape, described(bias), described(residual), rows


def linear_product(x: Tensor, weight: PackedWeight, geglu: bool) -> Product:
    """The product of ``x [..., K]`` and ``weight``."""
    n, k = weight.rows, weight.cols
    return Product("geglu" if geglu else "linear", weight.qtype, x.numel() // k, n, k)


def conv_product(
    x: Tensor, weight: PackedWeight, stride: int, padding: int, enlarged: tuple[int, int] | None = None
) -> Product:
    """The product that a convolution of ``x [B, IC, H, W]`` is, or of x ``enlarged`` to H and W."""
    n, _, kh, kw = weight.shape
    height, width = enlarged or x.shape[2:]
    oh, ow = ((size + 2 * padding - taps) // stride + 1 for size, taps in ((height, kh), (width, kw)))
    return Product("conv", weight.qtype, x.shape[0] * oh * ow, n, weight.cols, taps=kh * kw)


def linear_shape(
    x: Tensor, weight: PackedWeight, bias: Tensor | None, residual: Tensor | None, geglu: bool
) -> tuple[int, ...]:
    """Shape of ``x [..., K]`` times ``weight``: ``[..., N]``, or ``[..., N/2]`` with ``geglu``.

    Raises ValueError for dtypes other than float16 and bfloat16, and operands that do not fit.
    """
    n, k = weight.rows, weight.cols
    _check_dtype(x)
    if x.ndim < 1 or x.shape[-1] != k:
        raise ValueError(f"x {list(x.shape)} does not end in the weight's {k} inputs")
    if geglu and (n % 2 or residual is not None):
        raise ValueError(f"GEGLU halves the outputs, of which there are {n}, and takes no residual")
    if bias is not None and tuple(bias.shape) != (n,):
        raise ValueError(f"the bias of {n} outputs is [{n}], got {list(bias.shape)}")
    result = (*x.shape[:-1], n // 2 if geglu else n)
    if residual is not None and tuple(residual.shape) != result:
        raise ValueError(f"the residual of a result {list(result)} has its shape, got {list(residual.shape)}")
    m = x.numel() // k
    if max(x.numel(), m * n) > MAX_ELEMENTS:
        raise ValueError(f"{m} rows of {k} inputs and {n} outputs are too many for 32-bit offsets; split the batch")
    return result


@dataclass(frozen=True)
class ConvSizes:
    """Sizes of ``x [batch, ic, height, width]`` and the result ``[batch, n, oh, ow]``; ``kw`` taps side by side."""

    batch: int
    height: int
    width: int
    ic: int
    oh: int
    ow: int
    kw: int
    stride: int
    padding: int
    emb_stride: int  # between the rows of what is added to every pixel
    product: Product

    @property
    def numbers(self) -> tuple[int, ...]:
        """In the order of the kernels' arguments, from ``emb_stride`` to ``padding``."""
        product, picture = self.product, (self.height, self.width, self.ic, self.oh, self.ow)
        return self.emb_stride, product.m, product.n, product.k, *picture, self.stride, self.padding

    @property
    def result(self) -> tuple[int, int, int, int]:
        """``(B, OC, OH, OW)``."""
        return self.batch, self.product.n, self.oh, self.ow


def conv_sizes(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    stride: int,
    padding: int,
    *,
    residual: Tensor | None,
    emb: Tensor | None,
    enlarged: tuple[int, int] | None = None,
) -> ConvSizes:
    """Sizes of the convolution of ``x [B, IC, H, W]``, or of x ``enlarged`` to H and W, with a tap-major weight of
    shape ``(OC, IC, KH, KW)``.

    Raises ValueError for a weight in (IC, KH, KW) order, channels that are no multiple of 32, dtypes other than
    float16 and bfloat16, and operands that do not fit.
    """
    _check_dtype(x)
    if len(weight.shape) != 4:
        raise ValueError(f"a convolution's weight is (OC, IC, KH, KW), got {list(weight.shape)}")
    n, ic, kh, kw = weight.shape
    if ic % 32 or not (weight.tap_major or kh == kw == 1):
        raise ValueError(f"weight {list(weight.shape)} is not tap-major with channels in 32s; dequantize it")
    if x.ndim != 4 or x.shape[1] != ic:
        raise ValueError(f"x {list(x.shape)} is not [B, {ic}, H, W], which a weight {list(weight.shape)} takes")
    batch, _, height, width = x.shape
    if enlarged is not None:
        if not doubles((height, width), enlarged):
            raise ValueError(f"a picture is enlarged to twice its size, or one less, got {enlarged} of {height, width}")
        height, width = enlarged
    oh, ow = ((size + 2 * padding - taps) // stride + 1 for size, taps in ((height, kh), (width, kw)))
    if min(oh, ow) < 1:
        raise ValueError(f"a picture of {height} x {width} padded by {padding} is smaller than {kh} x {kw}")
    result = (batch, n, oh, ow)
    for name, tensor, shape in (("bias", bias, (n,)), ("emb", emb, (batch, n)), ("residual", residual, result)):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"the {name} of a result {list(result)} is {list(shape)}, got {list(tensor.shape)}")
    m = batch * oh * ow
    if max(batch * height * width * ic + (padding * width + padding) * ic, m * n) > MAX_ELEMENTS:
        raise ValueError(f"x {list(x.shape)} is too large for 32-bit offsets; split the batch or tile the picture")
    product = Product("conv", weight.qtype, m, n, weight.cols, taps=kh * kw)
    emb_stride = 0 if emb is None else emb.stride(0)
    return ConvSizes(batch, height, width, ic, oh, ow, kw, stride, padding, emb_stride, product)


def doubles(size: tuple[int, int], enlarged: tuple[int, int]) -> bool:
    """Whether pixel y, x of a picture ``enlarged`` by nearest neighbours is y/2, x/2 of the one of ``size``, rounded
    down: so it is at twice the size, or one less."""
    return all(large in (2 * small, 2 * small - 1) for small, large in zip(size, enlarged, strict=True))


def _check_dtype(x: Tensor) -> None:
    if x.dtype not in DTYPES:
        raise ValueError(f"fused products take float16 and bfloat16, got {x.dtype}")
