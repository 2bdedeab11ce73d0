"""LoRA beside a layer: the layer runs as it is, quantised or not, and a few small products are added to its result.

Nothing is requantised, and a layer without a LoRA is the very same module as before.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gguf_sd.adapters.factors import Dense, Factors, Kronecker, LowRank
from gguf_sd.adapters.targets import Target
from gguf_sd.models.int8 import Int8Linear
from gguf_sd.models.layers import AfterGroupNorm, AroundNorm, Quantized
from gguf_sd.models.unet_blocks import Attention, ResBlock
from gguf_sd_kernels import ops

WHOLE = slice(None)


class Adapted(AfterGroupNorm, AroundNorm, nn.Module):
    """``base``, a linear or convolution of :mod:`gguf_sd.models.layers`, with what is added to its result."""

    def __init__(self, base: nn.Module, paths: Iterable[nn.Module]):
        super().__init__()
        self.base, self.paths = base, nn.ModuleList(paths)

    def forward(self, x: Tensor, *args: Tensor | None, **kwargs: Tensor | None) -> Tensor:
        """As ``base``."""
        y: Tensor = self.base(x, *args, **kwargs)
        for path in self.paths:
            path(x, y)
        return y

    def enlarged(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """The layer of x enlarged to ``size`` (H, W), by its nearest neighbours."""
        y: Tensor = self.base.enlarged(x, size)  # type: ignore[operator]
        x = F.interpolate(x, size=size)
        for path in self.paths:
            path(x, y)
        return y

    def geglu(self, x: Tensor) -> Tensor:
        """value * gelu(gate), the halves of y: x [..., in] -> [..., out / 2]."""
        return ops.geglu(self(x))


def _rows(x: Tensor) -> Tensor:
    """[..., C], or a feature map [B, C, H, W], as [N, C]; of what lies channels-last a view."""
    channels_last = x.permute(0, 2, 3, 1) if x.dim() == 4 else x
    return channels_last.reshape(-1, channels_last.shape[-1])


class _Path(nn.Module):
    """Adds to y [..., out], or [B, out, H, W], in place, at ``rows`` of its channels."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.stride, self.padding = _side(getattr(base, "stride", 1)), _side(getattr(base, "padding", 0))

    def _keep(self, name: str, tensor: Tensor, like: Tensor) -> None:
        kept = tensor.to(like)
        if kept.dim() == 4:
            kept = kept.contiguous(memory_format=torch.channels_last)
        self.register_parameter(name, nn.Parameter(kept, requires_grad=False))

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        """``weight`` [n, in] or [n, in, kh, kw] times x: [N, n], or a feature map."""
        if weight.dim() == 4:
            return F.conv2d(x, weight, None, self.stride, self.padding)
        return F.linear(_rows(x), weight)


def _side(value: Any) -> int:
    """Of the same both ways, as our own convolutions have it, or nn.Conv2d's pair."""
    return int(value[0] if isinstance(value, tuple) else value)


class LowRankPath(_Path):
    """y[rows] += up @ (down x), of all factors at once: the ranks of several LoRAs lie side by side, and the layers of
    a stack share the product with ``down``."""

    down: Tensor

    def __init__(self, base: nn.Module, pieces: Sequence[tuple[slice, LowRank]], like: Tensor):
        super().__init__(base)
        self.places: list[tuple[slice, slice]] = []  # of the channels of y, and of the ranks
        self._keep("down", torch.cat([piece.down for _, piece in pieces]), like)
        start = 0
        for (first, last), group in groupby(pieces, key=lambda piece: (piece[0].start, piece[0].stop)):
            up = torch.cat([piece.up for _, piece in group], dim=1)
            self._keep(f"up{len(self.places)}", up, like)
            self.places.append((slice(first, last), slice(start, start + up.shape[1])))
            start += up.shape[1]

    def forward(self, x: Tensor, y: Tensor) -> None:
        low = self._product(x, self.down)
        low = _rows(low) if low.dim() == 4 else low
        into = _rows(y)
        for index, (rows, ranks) in enumerate(self.places):
            into[:, rows].addmm_(low[:, ranks], getattr(self, f"up{index}").t())
        if into.data_ptr() != y.data_ptr():  # y does not lie channels-last: into is a copy
            y.copy_(into.view(y.shape[0], *y.shape[2:], -1).permute(0, 3, 1, 2))


def _balanced(factors: LowRank) -> LowRank:
    """With values of about one size in both factors: alpha and weight may make those of ``up`` too small for
    float16."""
    high, low = (x.abs().max().item() for x in factors)
    if not high or not low:
        return factors
    by = 2.0 ** round(math.log2(low / high) / 2)
    return LowRank(factors.down * by, factors.up / by)


class KroneckerPath(_Path):
    """y[rows] += (left x right) x, without the product of the two."""

    left: Tensor
    right: Tensor

    def __init__(self, base: nn.Module, rows: slice, factors: Kronecker, like: Tensor):
        super().__init__(base)
        self.rows = rows
        self._keep("left", factors.left, like)
        self._keep("right", factors.right, like)

    def forward(self, x: Tensor, y: Tensor) -> None:
        groups = self.left.shape[1]
        if self.right.dim() == 4:
            inner = self._product(x.reshape(-1, x.shape[1] // groups, *x.shape[2:]), self.right)
            mixed = torch.matmul(self.left, inner.reshape(len(x), groups, -1))
            y[:, self.rows] += mixed.view(len(x), -1, *inner.shape[2:])
            return
        inner = F.linear(_rows(x).view(-1, groups, self.right.shape[1]), self.right)
        mixed = torch.matmul(self.left, inner).flatten(1)
        if y.dim() == 4:
            y[:, self.rows] += mixed.view(len(y), *y.shape[2:], -1).permute(0, 3, 1, 2)
        else:
            y[..., self.rows] += mixed.view(*y.shape[:-1], -1)


class DensePath(_Path):
    """y[rows] += value x: as much work as the layer's own product."""

    value: Tensor

    def __init__(self, base: nn.Module, rows: slice, value: Tensor, like: Tensor):
        super().__init__(base)
        self.rows = rows
        self._keep("value", value, like)

    def forward(self, x: Tensor, y: Tensor) -> None:
        added = self._product(x, self.value)
        if added.dim() == 4:
            y[:, self.rows] += added
        elif y.dim() == 4:
            y[:, self.rows] += added.view(len(y), *y.shape[2:], -1).permute(0, 3, 1, 2)
        else:
            y[..., self.rows] += added.view(*y.shape[:-1], -1)


def attach(
    model: nn.Module, changes: Iterable[tuple[Target, Factors]], dtype: torch.dtype, device: torch.device
) -> None:
    """Lays the factors of each layer beside it, in place, in the dtype and on the device that the model computes in and
    on. The model may be on any kernels, stacked, and streamed."""
    like = torch.empty(0, dtype=dtype, device=device)
    stacks = _stacks(model)
    found: dict[str, list[tuple[slice, Factors]]] = {}
    for target, factors in changes:
        module, rows = stacks.get(target.module, (target.module, WHOLE))
        found.setdefault(module, []).append((rows, _moved(factors, like)))  # never a whole LoRA in float32
    for name, placed in found.items():
        base = model.get_submodule(name)
        model.set_submodule(name, Adapted(base, _paths(base, placed, like)))


def _moved(piece: Factors, like: Tensor) -> Factors:
    if isinstance(piece, LowRank):
        piece = _balanced(piece)
    return type(piece)(*(x.to(like) for x in piece))


def detach(model: nn.Module) -> None:
    """Puts back the modules as they were."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Adapted):
            model.set_submodule(name, module.base)


def side_bytes(model: nn.Module) -> int:
    """Bytes of what lies beside a model's layers."""
    adapted = (module for module in model.modules() if isinstance(module, Adapted))
    return sum(parameter.nbytes for module in adapted for parameter in module.paths.parameters())


def _paths(base: nn.Module, placed: Sequence[tuple[slice, Factors]], like: Tensor) -> Iterator[nn.Module]:
    low = [(rows, piece) for rows, piece in placed if isinstance(piece, LowRank)]
    if low:
        yield LowRankPath(base, sorted(low, key=lambda x: x[0].start or 0), like)
    for rows, piece in placed:
        if isinstance(piece, Kronecker):
            yield KroneckerPath(base, rows, piece, like)
        elif isinstance(piece, Dense):
            yield DensePath(base, rows, piece.value, like)


def _stacks(model: nn.Module) -> dict[str, tuple[str, slice]]:
    """The layers that were made one with others, see :meth:`gguf_sd.models.unet.UNet.stack`: where they are now."""
    places: dict[str, tuple[str, slice]] = {}
    for name, module in model.named_modules():
        if isinstance(module, Attention) and module.to_qkv is not None:
            (out,) = module.to_out
            dim = out.shape[1] if isinstance(out, Quantized | Int8Linear) else cast(nn.Linear, out).in_features
            for index, leaf in enumerate(("to_q", "to_k", "to_v")):
                places[f"{name}.{leaf}"] = (f"{name}.to_qkv", slice(index * dim, (index + 1) * dim))
        elif isinstance(module, ResBlock) and module.place is not None:
            places[f"{name}.emb_layers.1"] = ("emb_layers", module.place)
    return places
