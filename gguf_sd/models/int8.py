"""Linears and convolutions that compute in 8 bits on a CPU, in place of those of :mod:`gguf_sd.models.layers`.

Weights are encoded once, from blocks of any type or from 16 bits; an activation is quantised when a layer takes it,
once for all products that share it, each picture of a batch over its own range. Activations between layers, norms and
attention stay in 16 or 32 bits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn

from gguf_sd.checkpoint.quant_tensor import QuantTensor
from gguf_sd.models.layers import (
    AfterGroupNorm,
    AroundNorm,
    Conv2d,
    GroupNorm,
    LayerNorm,
    Linear,
    Pointwise,
    PointwiseForward,
    QuantConv2d,
    Quantized,
    QuantPointwise,
    resident,
)
from gguf_sd.models.unet import UNetEncoder
from gguf_sd.models.unet_blocks import Stage, Upsample
from gguf_sd.models.vae import Autoencoder, ResnetBlock
from gguf_sd_kernels.cpu import enlarged, int8
from gguf_sd_kernels.normed import Measured

# Left in 16 bits: the prompt's keys and values, whose first token has values a hundred times the others', the
# convolutions that meet the latents themselves, and what is computed of the timestep alone, which costs nothing.
SIXTEEN_BITS = re.compile(
    r"\.attn2\.to_[kv]$|^input_blocks\.0\.|^out\.|\bemb_layers\b|^time_embed\.|^label_emb\."
    r"|^input_hint_block\.|^zero_convs\.|^middle_block_out\."  # of a ControlNet
)
# A decoder's convolutions in 8 bits, by their names in an autoencoder.
IN_DECODER = re.compile(r"decoder\..*\.(?:block\.\d+|block_\d)\.conv\d\.weight")

# Of a small map whose enlarged convolution is faster as four. Zen 4, 1280 channels: 16x16 0.46 of the time, 8x8 1.3.
MIN_PHASE_PIXELS = 128
PHASE_ROWS = 128  # outputs of such a convolution that are encoded at a time


def stays_wide(name: str) -> bool:
    """Whether the layer called so, of a UNet in its own names, stays in 16 bits."""
    return SIXTEEN_BITS.search(name) is not None


class Int8Layer(nn.Module):
    """What has its weights in 8 bits. They are no parameters: nothing moves or casts them."""

    def __init__(self, bias: Tensor | None):
        super().__init__()
        self.bias8 = None if bias is None else bias.detach().float()

    @property
    def weights8(self) -> tuple[int8.LinearWeight | int8.GatedWeight | int8.ConvWeight, ...]:
        raise NotImplementedError

    def in_tiles(self, dtype: torch.dtype) -> Int8Layer:
        """The layer, its weights in the order of tiles where results of ``dtype`` are computed in those: before the
        next layer is encoded, so that no two orders of all weights are ever in memory."""
        for weight in self.weights8:
            weight.tiles(dtype)
        return self

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return sum(weight.nbytes for weight in self.weights8)


class Int8Linear(AroundNorm, Int8Layer):
    """y = x W^T + b, and what is to be added to it."""

    def __init__(self, codes: int8.Codes, bias: Tensor | None):
        super().__init__(bias)
        self.shape = tuple(codes.values.shape)
        self.weight8 = int8.LinearWeight(codes)

    @property
    def weights8(self) -> tuple[int8.LinearWeight, ...]:
        return (self.weight8,)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [B, ..., in], residual [B, ..., out] -> [B, ..., out]."""
        return _by_picture(lambda x, *added: self._product(int8.quantize(x), x.dtype, *added), x, residual)

    def after_norm(self, norm: LayerNorm, x: Measured, geglu: bool = False) -> Tensor:
        """The layer of norm(x), which is written in 8 bits at once."""
        if geglu:
            return super().after_norm(norm, x, geglu)
        return _by_picture(lambda x: self._product(_layer_normed(norm, x), x.dtype), x.rows)

    def of_map(self, norm: GroupNorm, x: Tensor) -> Measured:
        """The layer of the pixels of norm(x)."""

        def one(x: Tensor) -> Tensor:
            codes = _group_normed(norm, x)
            pixels = codes.values.permute(0, 2, 3, 1).flatten(1, 2)
            return self._product(codes._replace(values=pixels), x.dtype)

        return Measured(_by_picture(one, x), None)

    def _product(self, x: int8.Activation, dtype: torch.dtype, residual: Tensor | None = None) -> Tensor:
        return int8.linear(x, self.weight8, self.bias8, dtype, residual)


class Int8Pointwise(PointwiseForward, Int8Linear):
    """A 1x1 convolution."""


class Int8GEGLU(AroundNorm, Int8Layer):
    """The projection of a GEGLU."""

    def __init__(self, codes: int8.Codes, bias: Tensor | None):
        super().__init__(bias)
        self.weight8 = int8.GatedWeight(codes, self.bias8)

    @property
    def weights8(self) -> tuple[int8.GatedWeight, ...]:
        return (self.weight8,)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [B, ..., in], residual [B, ..., out] -> [B, ..., out]: the values and the gates."""
        y = _by_picture(lambda x: int8.linear_halves(int8.quantize(x), self.weight8, x.dtype), x)
        return y if residual is None else y.add_(residual)

    def geglu(self, x: Tensor) -> Tensor:
        """value * gelu(gate): x [B, ..., in] -> [B, ..., out / 2]."""
        return _by_picture(lambda x: int8.linear_geglu(int8.quantize(x), self.weight8, x.dtype), x)

    def after_norm(self, norm: LayerNorm, x: Measured, geglu: bool = False) -> Tensor:
        """The layer, with GEGLU if ``geglu``, of norm(x), which is written in 8 bits at once."""
        multiply = int8.linear_geglu if geglu else int8.linear_halves
        return _by_picture(lambda x: multiply(_layer_normed(norm, x), self.weight8, x.dtype), x.rows)


class Int8Conv2d(AfterGroupNorm, Int8Layer):
    """A convolution, and what is to be added to it."""

    def __init__(self, codes: int8.Codes, bias: Tensor | None, stride: int, padding: int):
        super().__init__(bias)
        self.stride, self.padding = stride, padding
        self.weight8 = int8.ConvWeight(codes, stride, padding)

    @property
    def weights8(self) -> tuple[int8.ConvWeight, ...]:
        return (self.weight8,)

    def forward(self, x: Tensor, emb: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """x [B, C, H, W], emb [B, out] for every pixel, residual [B, out, H', W'] -> [B, out, H', W']."""
        return self._all(int8.quantize, x, emb, residual)

    def normed(self, norm: GroupNorm, x: Tensor, emb: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """The layer of norm(x), which is written in 8 bits at once, its SiLU taken on the way."""
        return self._all(partial(_group_normed, norm), x, emb, residual)

    def enlarged(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """The layer of x enlarged to ``size`` (H, W), by its nearest neighbours."""

        def coded(x: Tensor, margin: bool) -> int8.Activation:
            codes = int8.quantize(x)
            return codes._replace(values=nn.functional.interpolate(codes.values, size=size))

        return self._all(coded, x)

    def _all(
        self,
        coded: Callable[..., int8.Activation],
        x: Tensor,
        emb: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """The layer of what ``coded`` makes of a picture, with a ``margin`` where that is of use."""

        def one(x: Tensor, emb: Tensor | None, residual: Tensor | None) -> Tensor:
            bias = self.bias8
            if emb is not None:
                bias = emb[0].float() if bias is None else emb[0].float() + bias
            codes = coded(x, margin=self.weight8.tiles(x.dtype) is not None)
            return int8.convolve(codes, self.weight8, bias, x.dtype, residual)

        return _by_picture(one, x, emb, residual)


class Int8EnlargingConv2d(Int8Conv2d):
    """A 3x3 convolution that meets maps to be enlarged: to twice their size, as four of 2x2 taps."""

    def __init__(self, codes: int8.Codes, phases: Iterable[int8.Codes], bias: Tensor | None):
        """``phases``: those of the weights of :func:`gguf_sd_kernels.cpu.enlarged.phase_weights`."""
        super().__init__(codes, bias, stride=1, padding=1)
        self.phases8 = [int8.ConvWeight(phase, 1, 1) for phase in phases]

    @property
    def weights8(self) -> tuple[int8.ConvWeight, ...]:
        return (self.weight8, *self.phases8)

    def enlarged(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        height, width = x.shape[2:]
        tiles = self.phases8[0].tiles(x.dtype) is not None
        if size != (2 * height, 2 * width) or (height * width < MIN_PHASE_PIXELS and not tiles):
            return super().enlarged(x, size)

        def one(x: Tensor) -> Tensor:
            return int8.convolve_enlarged(int8.quantize(x, margin=tiles), self.phases8, self.bias8, x.dtype)

        return _by_picture(one, x)


def _layer_normed(norm: LayerNorm, x: Tensor) -> int8.Activation:
    return int8.quantize_layer_norm(x, norm.weight, norm.bias, norm.eps)


def _group_normed(norm: GroupNorm, x: Tensor, margin: bool = False) -> int8.Activation:
    return int8.quantize_group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps, norm.silu, margin)


def _by_picture(layer: Callable[..., Tensor], x: Tensor, *others: Tensor | None) -> Tensor:
    """``layer`` of each picture of x [B, …] and of the ``others`` [B, …]: over its own range, so that a picture is the
    same whatever is painted with it."""
    if x.shape[0] == 1 or x.dim() < 3:
        return layer(x, *others)
    parts = [[None] * x.shape[0] if other is None else other.split(1) for other in others]
    return torch.cat([layer(*picture) for picture in zip(x.split(1), *parts, strict=True)])


def use_int8(unet: UNetEncoder, dtype: torch.dtype) -> None:
    """Has a UNet, or the way down of one, compute in 8 bits, in place: all its linears and convolutions but those that
    stay in 16 bits, which become plain ones of ``dtype``. The model is on the CPU."""
    unet.stack()
    enlarging = {f"{name}.conv" for name, module in unet.named_modules() if isinstance(module, Upsample)}
    # Only names are kept: what a layer had in blocks is let go with it.
    for name in [
        name for name, module in unet.named_modules() if isinstance(module, Stage | Quantized | Linear | Conv2d)
    ]:
        module = unet.get_submodule(name)
        if isinstance(module, Stage):
            module.by_picture = True
        elif name in enlarging:
            unet.set_submodule(name, _enlarging(module).in_tiles(dtype))
        elif not stays_wide(name):
            unet.set_submodule(name, in_8_bits(name, module).in_tiles(dtype))
        elif isinstance(module, Quantized):
            unet.set_submodule(name, resident(module, dtype))


def use_int8_decoder(vae: Autoencoder, dtype: torch.dtype) -> None:
    """Has the decoder's residual blocks, most of its work, compute in 8 bits, in place, on the CPU. What takes values
    that no norm has been over stays as it is. The demo's pictures are 53 dB from float32's, in bfloat16 54."""
    for block in [module for module in vae.decoder.modules() if isinstance(module, ResnetBlock)]:
        for name in ("conv1", "conv2"):
            block.set_submodule(name, in_8_bits(name, block.get_submodule(name)).in_tiles(dtype))


def _enlarging(conv: nn.Module) -> Int8EnlargingConv2d:
    assert isinstance(conv, Conv2d | QuantConv2d)
    out, channels = (conv.weight if isinstance(conv, Conv2d) else conv).shape[:2]
    phases = [int8.Codes(torch.empty(out, 2, 2, channels, dtype=torch.int8), torch.empty(out)) for _ in enlarged.PHASES]
    for start in range(0, out, PHASE_ROWS):  # in 32 bits there is only a part of them in memory
        rows = slice(start, start + PHASE_ROWS)
        for codes, weight in zip(phases, enlarged.phase_weights(_rows_of(conv, rows)), strict=True):
            some = int8.Codes.of(weight)
            codes.values[rows], codes.scales[rows] = some.values.permute(0, 2, 3, 1), some.scales
    laid_out = (codes._replace(values=codes.values.permute(0, 3, 1, 2)) for codes in phases)
    return Int8EnlargingConv2d(_codes(conv), laid_out, conv.bias)


def _rows_of(conv: Conv2d | QuantConv2d, rows: slice) -> Tensor:
    """The weights of some outputs, float32 or 16 bits ``[rows, in, 3, 3]``."""
    if isinstance(conv, Conv2d):
        return conv.weight[rows].detach()
    blocks, shape = conv.blocks[rows], conv.shape
    return QuantTensor(blocks, conv.qtype, (len(blocks), *shape[1:]), conv.tap_major).dequantize(torch.float32)


def _codes(module: Quantized | Linear | Conv2d) -> int8.Codes:
    if isinstance(module, Quantized):
        return int8.Codes.of_blocks(module.blocks, module.qtype, module.shape, tap_major=module.tap_major)
    return int8.Codes.of(module.weight)


def in_8_bits(name: str, module: nn.Module) -> Int8Layer:
    assert isinstance(module, Quantized | Linear | Conv2d)
    codes = _codes(module)
    if isinstance(module, QuantConv2d):
        return Int8Conv2d(codes, module.bias, module.stride, module.padding)
    if isinstance(module, Conv2d):
        assert not isinstance(module.padding, str)
        return Int8Conv2d(codes, module.bias, module.stride[0], module.padding[0])
    if name.endswith(".net.0.proj"):
        return Int8GEGLU(codes, module.bias)
    kind = Int8Pointwise if isinstance(module, Pointwise | QuantPointwise) else Int8Linear
    return kind(codes, module.bias)
