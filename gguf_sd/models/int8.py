"""Linears and convolutions that compute in 8 bits on a CPU, in place of those of :mod:`gguf_sd.models.layers`.

Weights are encoded once, from blocks of any type or from 16 bits; an activation is quantised when a layer takes it,
once for all products that share it. Activations between layers, norms and attention stay in 16 or 32 bits.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from gguf_sd.models.layers import (
    AfterGroupNorm,
    AroundNorm,
    Conv2d,
    GroupNorm,
    Linear,
    Pointwise,
    PointwiseForward,
    QuantConv2d,
    Quantized,
    QuantPointwise,
    added,
    resident,
)
from gguf_sd.models.unet import UNetEncoder
from gguf_sd_kernels.cpu import int8
from gguf_sd_kernels.cpu.linear import GEGLU_ROWS

# Left in 16 bits: the prompt's keys and values, whose first token has values a hundred times the others', the
# convolutions that meet the latents themselves, and what is computed of the timestep alone, which costs nothing.
SIXTEEN_BITS = re.compile(
    r"\.attn2\.to_[kv]$|^input_blocks\.0\.|^out\.|\bemb_layers\b|^time_embed\.|^label_emb\."
    r"|^input_hint_block\.|^zero_convs\.|^middle_block_out\."  # of a ControlNet
)


def stays_wide(name: str) -> bool:
    """Whether the layer called so, of a UNet in its own names, stays in 16 bits."""
    return SIXTEEN_BITS.search(name) is not None


class Int8Layer(nn.Module):
    """What has its weights in 8 bits. They are no parameters: nothing moves or casts them."""

    def __init__(self, bias: Tensor | None):
        super().__init__()
        self.bias8 = None if bias is None else bias.detach().float()

    @property
    def weights8(self) -> tuple[int8.LinearWeight | int8.ConvWeight, ...]:
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return sum(weight.nbytes for weight in self.weights8)


class Int8Linear(AroundNorm, Int8Layer):
    """y = x W^T + b, and what is to be added to it."""

    def __init__(self, codes: int8.Codes, bias: Tensor | None):
        super().__init__(bias)
        self.shape = tuple(codes.values.shape)
        self.weight8 = int8.LinearWeight.of(codes)

    @property
    def weights8(self) -> tuple[int8.LinearWeight, ...]:
        return (self.weight8,)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [..., in], residual [..., out] -> [..., out]."""
        return int8.linear(int8.quantize(x), self.weight8, self.bias8, x.dtype, residual)


class Int8Pointwise(PointwiseForward, Int8Linear):
    """A 1x1 convolution."""


class Int8GEGLU(AroundNorm, Int8Layer):
    """The projection of a GEGLU, whose two halves are weights of their own."""

    def __init__(self, codes: int8.Codes, bias: Tensor | None):
        super().__init__(bias)
        values, scales = codes
        self.value8, self.gate8 = (
            int8.LinearWeight.of(int8.Codes(half, scale))
            for half, scale in zip(values.chunk(2), scales.chunk(2), strict=True)
        )

    @property
    def weights8(self) -> tuple[int8.LinearWeight, ...]:
        return self.value8, self.gate8

    @property
    def _biases(self) -> tuple[Tensor | None, Tensor | None]:
        if self.bias8 is None:
            return None, None
        value, gate = self.bias8.chunk(2)
        return value, gate

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [..., in], residual [..., out] -> [..., out]: the values and the gates."""
        rows, biases = int8.quantize(x), self._biases
        halves = zip(self.weights8, biases, strict=True)
        y = torch.cat([int8.linear(rows, weight, bias, x.dtype) for weight, bias in halves], dim=-1)
        return y if residual is None else y.add_(residual)

    def geglu(self, x: Tensor) -> Tensor:
        """value * gelu(gate): x [..., in] -> [..., out / 2]."""
        rows = int8.quantize(x.reshape(-1, x.shape[-1]))
        value_bias, gate_bias = self._biases
        out = x.new_empty(len(rows.values), len(self.value8.scales))
        for codes, result in zip(rows.values.split(GEGLU_ROWS), out.split(GEGLU_ROWS), strict=True):
            part = rows._replace(values=codes)
            gates = int8.linear(part, self.gate8, gate_bias, x.dtype, gelu=True)
            torch.mul(gates, int8.linear(part, self.value8, value_bias, x.dtype), out=result)
        return out.view(*x.shape[:-1], -1)


class Int8Conv2d(AfterGroupNorm, Int8Layer):
    """A convolution, and what is to be added to it."""

    def __init__(self, codes: int8.Codes, bias: Tensor | None, stride: int, padding: int):
        super().__init__(bias)
        self.stride, self.padding = stride, padding
        self.weight8 = int8.ConvWeight.of(codes, stride, padding)

    @property
    def weights8(self) -> tuple[int8.ConvWeight, ...]:
        return (self.weight8,)

    def forward(self, x: Tensor, emb: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """x [B, C, H, W], emb [B, out] for every pixel, residual [B, out, H', W'] -> [B, out, H', W']."""
        return self._convolve(int8.quantize(x), x.dtype, emb, residual)

    def normed(self, norm: GroupNorm, x: Tensor, emb: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """The layer of norm(x), whose SiLU is taken on the way into 8 bits."""
        return self._convolve(int8.quantize(norm.without_silu(x), norm.silu), x.dtype, emb, residual)

    def enlarged(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """The layer of x enlarged to ``size`` (H, W), by its nearest neighbours."""
        small = int8.quantize(x)
        large = small._replace(values=nn.functional.interpolate(small.values, size=size))
        return self._convolve(large, x.dtype, None, None)

    def _convolve(self, x: int8.Activation, dtype: torch.dtype, emb: Tensor | None, residual: Tensor | None) -> Tensor:
        bias = self.bias8
        if emb is not None and torch.equal(emb, emb[:1].expand_as(emb)):  # as for pictures of one timestep
            bias, emb = emb[0].float() if bias is None else emb[0].float() + bias, None
        return added(int8.convolve(x, self.weight8, bias, dtype), emb, residual)


def use_int8(unet: UNetEncoder, dtype: torch.dtype) -> None:
    """Has a UNet, or the way down of one, compute in 8 bits, in place: all its linears and convolutions but those that
    stay in 16 bits, which become plain ones of ``dtype``. The model is on the CPU."""
    unet.stack()
    for name, module in list(unet.named_modules()):
        if not isinstance(module, Quantized | Linear | Conv2d):
            continue
        if not stays_wide(name):
            unet.set_submodule(name, _in_8_bits(name, module))
        elif isinstance(module, Quantized):
            unet.set_submodule(name, resident(module, dtype))


def _in_8_bits(name: str, module: Quantized | Linear | Conv2d) -> Int8Layer:
    if isinstance(module, Quantized):
        codes = int8.Codes.of_blocks(module.blocks, module.qtype, module.shape, tap_major=module.tap_major)
    else:
        codes = int8.Codes.of(module.weight)
    if isinstance(module, QuantConv2d):
        return Int8Conv2d(codes, module.bias, module.stride, module.padding)
    if isinstance(module, Conv2d):
        assert not isinstance(module.padding, str)
        return Int8Conv2d(codes, module.bias, module.stride[0], module.padding[0])
    if name.endswith(".net.0.proj"):
        return Int8GEGLU(codes, module.bias)
    kind = Int8Pointwise if isinstance(module, Pointwise | QuantPointwise) else Int8Linear
    return kind(codes, module.bias)
