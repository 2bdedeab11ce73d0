"""What the UNet of Stable Diffusion is built of: residual blocks, transformer blocks, and what changes the size.

Activations are channels-last throughout: a feature map [B, C, H, W] in channels-last memory is, without a
copy, the token sequence [B, H*W, C] that the transformer blocks work on. Convolutions with a 1x1 kernel are
linears over that sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gguf_sd.models.layers import Conv2d, GroupNorm, LayerNorm, Linear, Pointwise, QuantLinear, stacked
from gguf_sd.models.members import child
from gguf_sd_kernels import ops
from gguf_sd_kernels.normed import Measured


def tokens(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H*W, C]; a view when x is channels-last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def feature_map(x: Tensor, height: int, width: int) -> Tensor:
    """[B, H*W, C] -> channels-last [B, C, H, W], a view."""
    return x.view(x.shape[0], height, width, -1).permute(0, 3, 1, 2)


def as_often(x: Tensor, other: Tensor) -> Tensor:
    """x [b, …] until it is as many as ``other`` [B, …]: all of it in turn, B / b times; x itself where that is once."""
    many, there = other.shape[0], x.shape[0]  # not len(), which torch.export takes for constants
    return x if there == many else torch.cat([x] * (many // there))


class ResBlock(nn.Module):
    """Two 3x3 convolutions with the timestep embedding added between them, around a skip connection."""

    in_layers: nn.Sequential = child()
    emb_layers: nn.Sequential = child()
    out_layers: nn.Sequential = child()
    skip_connection: nn.Module = child()

    def __init__(self, in_channels: int, out_channels: int, time_dim: int, groups: int):
        super().__init__()
        self.in_layers = nn.Sequential(
            GroupNorm(groups, in_channels, 1e-5),
            nn.Identity(),  # keeps the checkpoint's numbering: its SiLU is part of GroupNorm here
            Conv2d(in_channels, out_channels, 3, padding=1),
        )
        # Its SiLU is the same for every block, and taken once for all.
        self.emb_layers = nn.Sequential(nn.Identity(), Linear(time_dim, out_channels))
        self.out_layers = nn.Sequential(
            GroupNorm(groups, out_channels, 1e-5),
            nn.Identity(),
            nn.Identity(),  # dropout in training code
            Conv2d(out_channels, out_channels, 3, padding=1),
        )
        same = in_channels == out_channels
        self.skip_connection = nn.Identity() if same else Pointwise(in_channels, out_channels)
        self.out_channels = out_channels
        self.place: slice | None = None  # of its projected embedding among those of all blocks, see UNet.stack

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x [B, C, H, W], emb [B, time_dim] after its SiLU or, once stacked, all blocks' projections of it
        -> [B, out_channels, H, W]."""
        norm, _, conv = self.in_layers
        own = self.emb_layers(emb) if self.place is None else emb[:, self.place]
        h = conv.normed(norm, x, emb=own)  # type: ignore[operator]
        norm, _, _, conv = self.out_layers
        return conv.normed(norm, h, residual=self.skip_connection(x))  # type: ignore[operator]


class Attention(nn.Module):
    """Multi-head attention of x to itself, or to the prompt: cross-attention, which is told by its ``context_dim``."""

    to_q: Linear = child()
    to_k: Linear = child()
    to_v: Linear = child()
    to_out: nn.Sequential = child()
    to_qkv: Linear | QuantLinear | None = child()

    def __init__(self, dim: int, context_dim: int | None, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = Linear(dim, dim, bias=False)
        self.to_k = Linear(context_dim or dim, dim, bias=False)
        self.to_v = Linear(context_dim or dim, dim, bias=False)
        self.to_out = nn.Sequential(Linear(dim, dim))
        self.to_qkv = None  # all three, after :meth:`stack`
        self.crosses = context_dim is not None
        self.place = slice(0)  # of cross-attention's keys and values among those of all layers

    def stack(self) -> None:
        """Makes one product of self-attention's three projections, where their weights are of one type: a third of the
        launches, each with three times the work for a GPU that a single one would leave idle."""
        if self.crosses or self.to_qkv is not None:
            return
        if (joined := stacked([self.to_q, self.to_k, self.to_v])) is not None:
            self.to_qkv = joined
            del self.to_q, self.to_k, self.to_v

    def project(self, context: Tensor) -> Tensor:
        """The keys and values of ``context`` [B, M, context_dim], side by side: [B, M, 2 * dim]."""
        return torch.cat([self.to_k(context), self.to_v(context)], dim=-1)

    def forward(self, norm: LayerNorm, x: Measured, projected: Tensor | None = None) -> Measured:
        """Of norm(x), added to x [B, N, dim] -> [B, N, dim]; for cross-attention ``projected`` [B, M, …] holds its keys
        and values at ``place``."""
        batch, tokens, _ = x.rows.shape
        to_qkv = self.to_qkv
        if to_qkv is not None:
            qkv = to_qkv.after_norm(norm, x)
            q, k, v = qkv.view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind()
        elif projected is None:
            rows = norm(x.rows)
            q, k, v = (self._by_heads(linear(rows)) for linear in (self.to_q, self.to_k, self.to_v))
        else:
            q = self._by_heads(self.to_q.after_norm(norm, x))
            both = projected[..., self.place]
            k, v = both.view(batch, both.shape[1], 2, self.heads, -1).permute(2, 0, 3, 1, 4).unbind()
        (out,) = self.to_out
        return out.measured(ops.attention(q, k, v).transpose(1, 2).flatten(2), x.rows)  # type: ignore[operator]

    def _by_heads(self, x: Tensor) -> Tensor:
        """[B, N, dim] -> [B, heads, N, dim / heads], a view."""
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)


class GEGLU(nn.Module):
    """x * gelu(gate), both from one projection (Shazeer 2020, arXiv:2002.05202)."""

    proj: Linear = child()

    def __init__(self, dim: int, inner: int):
        super().__init__()
        self.proj = Linear(dim, 2 * inner)

    def forward(self, norm: LayerNorm, x: Measured) -> Tensor:
        """Of norm(x)."""
        return self.proj.after_norm(norm, x, geglu=True)


class FeedForward(nn.Module):
    net: nn.Sequential = child()

    def __init__(self, dim: int):
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), Linear(4 * dim, dim))

    def forward(self, norm: LayerNorm, x: Measured, last: bool) -> Measured:
        """Of norm(x), added to x [B, N, dim] -> [B, N, dim]; no norm comes behind the ``last``."""
        geglu, _, out = self.net
        h = geglu(norm, x)
        return Measured(out(h, x.rows), None) if last else out.measured(h, x.rows)  # type: ignore[operator]


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the prompt, feed-forward; each with a LayerNorm before it."""

    attn1: Attention = child()
    ff: FeedForward = child()
    attn2: Attention = child()
    norm1: LayerNorm = child()
    norm2: LayerNorm = child()
    norm3: LayerNorm = child()

    def __init__(self, dim: int, context_dim: int, heads: int):
        super().__init__()
        self.attn1 = Attention(dim, None, heads)
        self.ff = FeedForward(dim)
        self.attn2 = Attention(dim, context_dim, heads)
        self.norm1 = LayerNorm(dim)
        self.norm2 = LayerNorm(dim)
        self.norm3 = LayerNorm(dim)

    def forward(self, x: Measured, projected: Tensor, last: bool) -> Measured:
        x = self.attn1(self.norm1, x)
        if x.rows.shape[0] != projected.shape[0]:  # nothing has depended on the prompts so far
            x = Measured(as_often(x.rows, projected), None)
        x = self.attn2(self.norm2, x, projected)
        return self.ff(self.norm3, x, last)


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map."""

    norm: GroupNorm = child()
    proj_in: Linear = child()
    transformer_blocks: nn.ModuleList = child()
    proj_out: Linear = child()

    def __init__(self, dim: int, context_dim: int, heads: int, depth: int, groups: int):
        super().__init__()
        self.norm = GroupNorm(groups, dim, 1e-6, silu=False)
        self.proj_in = Linear(dim, dim)
        self.transformer_blocks = nn.ModuleList(TransformerBlock(dim, context_dim, heads) for _ in range(depth))
        self.proj_out = Linear(dim, dim)

    def forward(self, x: Tensor, projected: Tensor) -> Tensor:
        """x [B, dim, H, W], projected as in :meth:`UNet.project` -> [B, dim, H, W]."""
        h = self.proj_in.of_map(self.norm, x)
        for i, block in enumerate(self.transformer_blocks, 1):
            h = block(h, projected, last=i == len(self.transformer_blocks))
        return feature_map(self.proj_out(h.rows, as_often(tokens(x), projected)), x.shape[2], x.shape[3])


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.op = Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Nearest-neighbour enlargement to the size of the skip it will meet, then a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return self.conv.enlarged(x, size)


class Stage(nn.ModuleList):
    """One numbered block of the checkpoint: each layer is handed what it takes."""

    by_picture = False  # whether a batch goes through one picture at a time

    def forward(self, x: Tensor, emb: Tensor, projected: Tensor, size: tuple[int, int]) -> Tensor:
        if self.by_picture and 1 < x.shape[0] == projected.shape[0]:
            pictures = zip(x.split(1), emb.split(1), projected.split(1), strict=True)
            return torch.cat([self._through(*picture, size) for picture in pictures])
        return self._through(x, emb, projected, size)

    def _through(self, x: Tensor, emb: Tensor, projected: Tensor, size: tuple[int, int]) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, projected)
            elif isinstance(layer, Upsample):
                x = layer(x, size)
            else:
                x = layer(x)
        return x
