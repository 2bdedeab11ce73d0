"""Which kernels a UNet step runs at a size: a step of a copy on the meta device, where it has shapes alone, tells."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gguf_sd.models.layers import (
    AfterGroupNorm,
    AroundNorm,
    GroupNorm,
    LayerNorm,
    PointwiseForward,
    QuantConv2d,
    Quantized,
    QuantPointwise,
)
from gguf_sd.models.unet import UNet
from gguf_sd_kernels.checks import doubles
from gguf_sd_kernels.normed import Measured
from gguf_sd_kernels.row_parts import RowParts
from gguf_sd_kernels.tuning.launch import Product
from gguf_sd_kernels.tuning.operands import Use
from gguf_sd_kernels.tuning.self_check import Subject
from gguf_sd_kernels.tuning.ways import norm_subject

CONTEXT_TOKENS = 77
FUSED_MODES = ("auto", "fused")  # whose products take in what comes before them
_PARTS = RowParts(torch.empty(2, 1, 0, device="meta"), 1)  # stands for those of a result without values


@dataclass
class StepKernels:
    """What a UNet step runs on our kernels: products with packed weights, how often each, and norms."""

    uses: Counter[tuple[Use, str]] = field(default_factory=Counter)  # with the mode of the layer
    norms: set[Subject] = field(default_factory=set)


def step_kernels(unet: UNet, batch: int, height: int, width: int, dtype: torch.dtype) -> StepKernels:
    """The kernels of a step of ``unet``, which has been handed to them, on latents [batch, C, height, width].

    ``unet`` itself does not run, and nothing of its weights is copied.
    """
    found = StepKernels()
    plain = on_meta(unet)
    for name, module in list(plain.named_modules()):
        if isinstance(module, Quantized) and module.packed is not None:
            plain.set_submodule(name, _recorder(module, found))
        elif isinstance(module, GroupNorm | LayerNorm) and module.fused:
            module.fused = False
            module.register_forward_pre_hook(lambda norm, inputs: found.norms.add(_norm(norm, inputs[0])))
    config, meta = unet.config, torch.device("meta")
    inputs = [
        torch.empty(batch, config.in_channels, height, width, dtype=dtype, device=meta),
        torch.empty(batch, device=meta),
        torch.empty(batch, CONTEXT_TOKENS, config.context_dim, dtype=dtype, device=meta),
    ]
    if config.vector_dim:
        inputs.append(torch.empty(batch, config.vector_dim, dtype=dtype, device=meta))
    with torch.inference_mode():
        plain(*inputs)
    return found


def on_meta(model: UNet) -> UNet:
    """A copy whose tensors have shapes alone."""
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        if isinstance(module, Quantized) and module.packed is not None:
            packed = module.packed
            tensors += [each for each in (packed.quants, packed.scales, packed.mins) if each is not None]
    memo: dict[int, Any] = {}
    for tensor in tensors:
        bare = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(bare, requires_grad=False) if isinstance(tensor, nn.Parameter) else bare
    return copy.deepcopy(model, memo)


def _norm(norm: nn.Module, x: Tensor) -> Subject:
    if isinstance(norm, GroupNorm):
        return norm_subject(tuple(x.shape), x.dtype, norm.num_groups, norm.silu)
    return norm_subject(tuple(x.shape), x.dtype)


class _Recorder(nn.Module):
    """Stands for a layer with a packed weight: notes the product, and gives a result without values."""

    def __init__(self, layer: Quantized, found: StepKernels):
        super().__init__()
        self.qtype, self.shape, self.tap_major, self.mode = layer.qtype, layer.shape, layer.tap_major, layer.mode
        self.bias, self.found = layer.bias is not None, found

    def _note(self, use: Use) -> None:
        self.found.uses[use, self.mode] += 1

    def _added(self, **operands: Tensor | None) -> tuple[str, ...]:
        added = {"bias": True if self.bias else None} | operands
        return tuple(name for name, operand in added.items() if operand is not None)


class _RecordingLinear(AroundNorm, _Recorder):
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        n, k = self.shape
        self._note(Use(Product("linear", self.qtype, x.numel() // k, n, k), self._added(residual=residual)))
        return x.new_empty(*x.shape[:-1], n)

    def geglu(self, x: Tensor) -> Tensor:
        n, k = self.shape
        self._note(Use(Product("geglu", self.qtype, x.numel() // k, n, k), self._added()))
        return x.new_empty(*x.shape[:-1], n // 2)

    def measured(self, x: Tensor, residual: Tensor | None = None) -> Measured:
        n, k = self.shape
        use = Use(Product("linear", self.qtype, x.numel() // k, n, k), (*self._added(residual=residual), "parts"))
        if self.mode not in FUSED_MODES:
            return Measured(self(x, residual), None)
        self._note(use)
        return Measured(x.new_empty(*x.shape[:-1], n), _PARTS)

    def after_norm(self, norm: nn.Module, x: Measured, geglu: bool = False) -> Tensor:
        if self.mode not in FUSED_MODES or x.parts is None:
            return self.geglu(norm(x.rows)) if geglu else self(norm(x.rows))
        n, k = self.shape
        op = "geglu" if geglu else "linear"
        self._note(Use(Product(op, self.qtype, x.rows.numel() // k, n, k), (*self._added(), "norm")))
        return x.rows.new_empty(*x.rows.shape[:-1], n // 2 if geglu else n)


class _RecordingPointwise(PointwiseForward, _RecordingLinear):
    pass


class _RecordingConv(AfterGroupNorm, _Recorder):
    def __init__(self, layer: QuantConv2d, found: StepKernels):
        super().__init__(layer, found)
        self.stride, self.padding = layer.stride, layer.padding

    def forward(self, x: Tensor, emb: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        added = self._added(residual=residual, emb=emb)
        return self._convolve(x, added, x.shape[2], x.shape[3])

    def enlarged(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        fits = self.stride == 1 and self.mode in FUSED_MODES and doubles((x.shape[2], x.shape[3]), size)
        return self._convolve(x, (*self._added(), *(("enlarge",) if fits else ())), *size)

    def _convolve(self, x: Tensor, added: tuple[str, ...], height: int, width: int) -> Tensor:
        n, channels, kh, kw = self.shape
        batch = x.shape[0]
        oh, ow = ((s + 2 * self.padding - t) // self.stride + 1 for s, t in ((height, kh), (width, kw)))
        product = Product("conv", self.qtype, batch * oh * ow, n, channels * kh * kw, kh * kw)
        picture = batch, channels, height, width
        self._note(Use(product, added, picture, self.stride, self.padding, self.tap_major))
        return x.new_empty(batch, n, oh, ow).contiguous(memory_format=torch.channels_last)


def _recorder(layer: Quantized, found: StepKernels) -> _Recorder:
    if isinstance(layer, QuantConv2d):
        return _RecordingConv(layer, found)
    return (_RecordingPointwise if isinstance(layer, QuantPointwise) else _RecordingLinear)(layer, found)
