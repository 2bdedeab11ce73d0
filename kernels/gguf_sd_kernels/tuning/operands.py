"""Random operands of a product: what kernels are checked and timed with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gguf_sd_kernels.cpu.activation import geglu
from gguf_sd_kernels.formats import block_format
from gguf_sd_kernels.reference.products import conv_weight, dequantize
from gguf_sd_kernels.repack import PackedWeight, unpack
from gguf_sd_kernels.row_parts import FoldedNorm, RowParts, decoded_dtype
from gguf_sd_kernels.tuning.launch import Launch, Product

# What is added to a product, in the order of their names here; "norm" normalises the rows of x before, "parts" are what
# the rows of the result leave for the next norm, see row_parts; "enlarge" makes a picture of its half before.
ADDED = ("bias", "residual", "emb", "norm", "parts", "enlarge")
CODE_RMS = {"Q4_0": 4.64, "Q4_1": 4.61, "Q8_0": 73.9}  # of uniformly random codes, less their zero point


PART_WIDTH, EPS = 64, 1e-5


@dataclass(frozen=True)
class Use:
    """A product as a layer makes it: what is ``added`` to it, of ADDED, and for a convolution the ``picture``
    (B, IC, H, W) it walks over; ``tap_major`` as in :class:`gguf_sd_kernels.repack.PackedWeight`."""

    product: Product
    added: tuple[str, ...] = ()
    picture: tuple[int, int, int, int] | None = None
    stride: int = 1
    padding: int = 0
    tap_major: bool = True

    @property
    def weight_shape(self) -> tuple[int, ...]:
        product = self.product
        if self.picture is None:
            return product.n, product.k
        side = math.isqrt(product.taps)
        return product.n, product.k // product.taps, side, side

    @property
    def given(self) -> tuple[int, int, int, int] | None:
        """The picture as it lies in memory."""
        if self.picture is None or "enlarge" not in self.added:
            return self.picture
        batch, channels, height, width = self.picture
        return batch, channels, (height + 1) // 2, (width + 1) // 2

    @property
    def enlarged(self) -> tuple[int, int] | None:
        """The size it is enlarged to before, if any."""
        return self.picture[2:] if self.picture is not None and "enlarge" in self.added else None

    def nbytes(self, itemsize: int = 2) -> int:
        """Bytes that have to be read and written at least: the weight in its blocks, activations of ``itemsize``."""
        product = self.product
        fmt = block_format(product.qtype)
        read = product.m * product.k if self.given is None else math.prod(self.given)
        written = product.m * product.n // (2 if product.op == "geglu" else 1)
        added = written * ("residual" in self.added)
        return product.n * product.k // fmt.block_size * fmt.type_size + (read + written + added) * itemsize


class Operands:
    """The operands of ``use`` in ``dtype`` on ``device``, with ``copies`` of the weight."""

    def __init__(self, use: Use, dtype: torch.dtype, device: torch.device, copies: int = 1):
        self.use, self.dtype, self.device = use, dtype, device
        self._generator = torch.Generator(device).manual_seed(0)  # the caller's random numbers stay what they were
        product = use.product
        self.weights = [self._weight() for _ in range(copies)]
        self.x = self._normal(*(use.given or (product.m, product.k)))
        result: tuple[int, ...] = product.m, product.n // (2 if product.op == "geglu" else 1)
        if use.picture is not None:
            self.x = self.x.contiguous(memory_format=torch.channels_last)
            side = math.isqrt(product.taps)
            result = (
                use.picture[0],
                product.n,
                *((s + 2 * use.padding - side) // use.stride + 1 for s in use.picture[2:]),
            )
        self.norm = (1 + 0.1 * self._normal(product.k), self._normal(product.k)) if "norm" in use.added else None
        if self.norm is not None:
            self.x = self.x * 2 + 1
        self.left: RowParts | None = None  # of the last result
        self.bias = self._normal(product.n) if "bias" in use.added else None
        self.emb = self._normal(len(self.x), product.n) if "emb" in use.added else None
        self.residual = self._normal(*result) if "residual" in use.added else None
        if self.residual is not None and use.picture is not None:
            self.residual = self.residual.contiguous(memory_format=torch.channels_last)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, device=self.device).to(self.dtype)

    def _weight(self) -> PackedWeight:
        """Random codes, under normal scales that keep results near 1."""
        product = self.use.product
        fmt = block_format(product.qtype)
        codes = (product.n, product.k * fmt.quant_bytes // fmt.block_size)
        quants = torch.randint(0, 256, codes, generator=self._generator, dtype=torch.uint8, device=self.device)
        scales = torch.randn(product.n, product.k // 32, generator=self._generator, device=self.device)
        scales = (scales * product.k**-0.5 / CODE_RMS[product.qtype]).half()
        mins = -7.5 * scales if fmt.min_bytes else None
        return PackedWeight(quants, scales, mins, product.qtype, self.use.weight_shape, self.use.tap_major)

    def call(self, launch: Launch, int8: bool = False, copy: int = 0) -> Tensor:
        """The product with its weight decoded inside it, or with both operands in 8 bits."""
        use, weight = self.use, self.weights[copy]
        options: dict[str, Any] = {"residual": self.residual, "launch": launch}
        if use.picture is not None:
            from gguf_sd_kernels.triton.conv import conv2d_fused
            from gguf_sd_kernels.triton.int8 import conv2d_int8

            if use.enlarged is not None:
                options["enlarged"] = use.enlarged
            convolve = conv2d_int8 if int8 else conv2d_fused
            return convolve(self.x, weight, self.bias, use.stride, use.padding, emb=self.emb, **options)
        from gguf_sd_kernels.triton.int8 import linear_int8
        from gguf_sd_kernels.triton.linear import linear_fused, linear_measured, linear_normed

        geglu = use.product.op == "geglu"
        if self.norm is not None:
            return linear_normed(self.x, self._parts, weight, self._folded[copy], geglu=geglu, launch=launch)
        if "parts" in use.added:
            y, self.left = linear_measured(self.x, weight, self.bias, self.residual, launch=launch)
            return y
        multiply = linear_int8 if int8 else linear_fused
        return multiply(self.x, weight, self.bias, geglu=geglu, **options)

    @cached_property
    def _parts(self) -> RowParts:
        return RowParts.of(self.x, PART_WIDTH)

    @cached_property
    def _folded(self) -> list[FoldedNorm]:
        assert self.norm is not None
        decoded = (dequantize(unpack(weight), weight.qtype, decoded_dtype(self.dtype)) for weight in self.weights)
        return [FoldedNorm.of(weight, self.bias, *self.norm, EPS, self.dtype) for weight in decoded]

    def decoded(self, out: Tensor | None = None, copy: int = 0) -> Tensor:
        """The weight decoded by our kernel, into ``out`` where given."""
        from gguf_sd_kernels.triton.dequantize import dequantize_packed

        return dequantize_packed(self.weights[copy], self.dtype, out)

    def library(self, weight: Tensor) -> Tensor:
        """The product of cuBLAS or cuDNN with a decoded weight."""
        use = self.use
        if use.picture is not None:
            y = F.conv2d(self._picture(), weight, self.bias, use.stride, use.padding)
            y = y if self.emb is None else y.add_(self.emb[:, :, None, None])
        else:
            x = self.x if self.norm is None else F.layer_norm(self.x, (use.product.k,), *self.norm, EPS)
            y = F.linear(x, weight, self.bias)
            if use.product.op == "geglu":
                return geglu(y)
        return y if self.residual is None else y.add_(self.residual)

    def _picture(self) -> Tensor:
        """What is convolved."""
        return self.x if self.use.enlarged is None else F.interpolate(self.x, size=self.use.enlarged)

    def plain_weight(self) -> Tensor:
        """The weight decoded by plain torch, to ``dtype``."""
        use = self.use
        blocks, qtype = unpack(self.weights[0]), use.product.qtype
        if use.picture is None:
            return dequantize(blocks, qtype, self.dtype)
        oc, ic, kh, kw = use.weight_shape
        return conv_weight(blocks, qtype, (oc, ic, kh, kw), self.dtype, tap_major=use.tap_major)

    def plain(self) -> Tensor:
        """The product in plain torch: weights rounded to ``dtype``, sums in float64, rounded once. No convolution is
        called, as libraries make them in formats of their own choice."""
        use, weight = self.use, self.plain_weight().double()
        if use.picture is not None:
            windows = F.unfold(self._picture().double(), weight.shape[2:], padding=use.padding, stride=use.stride)
            assert use.picture is not None
            height = (use.picture[2] + 2 * use.padding - weight.shape[2]) // use.stride + 1
            y = (weight.flatten(1) @ windows).unflatten(2, (height, -1))
            y = y if self.bias is None else y + self.bias[:, None, None]
            y = y if self.emb is None else y + self.emb[:, :, None, None]
        else:
            x = self.x.double()
            if self.norm is not None:
                x, weight, shift = self._plain_norm(x)
            y = x @ weight.T
            y = y if self.norm is None else y + shift
            y = y if self.bias is None else y + self.bias
            if use.product.op == "geglu":
                value, gate = y.chunk(2, dim=-1)
                y = value * F.gelu(gate)
        y = y if self.residual is None else y + self.residual
        return y.to(self.dtype)

    def _plain_norm(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows normalised; the weight [N, K] with the gain, rounded to ``dtype`` as it is multiplied; the share of the
        shift [N], of the weight before that rounding, as :class:`FoldedNorm` adds it once for all."""
        assert self.norm is not None
        gain, shift = self.norm
        exact = dequantize(unpack(self.weights[0]), self.use.product.qtype, decoded_dtype(self.dtype))
        gained = (exact * gain.to(exact.dtype)).to(self.dtype).double()
        return F.layer_norm(x, (x.shape[1],), eps=EPS), gained, exact.double() @ shift.double()
