"""The conditional UNet of Stable Diffusion 1.x and XL, module names as in the original (LDM) checkpoints.

Activations are channels-last throughout: a feature map [B, C, H, W] in channels-last memory is, without a
copy, the token sequence [B, H*W, C] that the transformer blocks work on. Convolutions with a 1x1 kernel are
linears over that sequence.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from gguf_sd.config import UNetConfig
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
        h = conv(norm(x), emb=self.emb_layers(emb) if self.place is None else emb[:, self.place])
        norm, _, _, conv = self.out_layers
        return conv(norm(h), residual=self.skip_connection(x))


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
        if not self.crosses and (joined := stacked([self.to_q, self.to_k, self.to_v])) is not None:
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
        out = cast(Linear, self.to_out[0])
        return out.measured(ops.attention(q, k, v).transpose(1, 2).flatten(2), x.rows)

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
        out = cast(Linear, self.net[2])
        h = self.net[0](norm, x)
        return Measured(out(h, x.rows), None) if last else out.measured(h, x.rows)


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
        h = self.proj_in.measured(tokens(self.norm(x)))
        for i, block in enumerate(self.transformer_blocks, 1):
            h = block(h, projected, last=i == len(self.transformer_blocks))
        return feature_map(self.proj_out(h.rows, tokens(x)), x.shape[2], x.shape[3])


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

    def forward(self, x: Tensor, emb: Tensor, projected: Tensor, size: tuple[int, int]) -> Tensor:
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


def timestep_embedding(timesteps: Tensor, dim: int) -> Tensor:
    """Sinusoids of the timestep, cosines first: [B] -> float32 [B, dim]. As in diffusers' get_timestep_embedding
    with flip_sin_to_cos and no shift."""
    frequencies = _frequencies if is_compiling() else _kept_frequencies  # a compiler folds constants itself
    angles = timesteps.float()[:, None] * frequencies(dim // 2, timesteps.device)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def _frequencies(half: int, device: torch.device) -> Tensor:
    """Of the sinusoids, float32 [half], falling from 1 to nearly 1 / 10000."""
    return torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=device) / half)


def _kept_frequencies(half: int, device: torch.device) -> Tensor:
    """The same, made once: they are the same at every step."""
    known = _known_frequencies.get((half, device))
    if known is None:
        with torch.inference_mode(False):  # usable in inference mode and out of it
            known = _frequencies(half, device)
        if type(known) is Tensor:  # no stand-in, as of a FakeTensorMode
            _known_frequencies[half, device] = known
    return known


_known_frequencies: dict[tuple[int, torch.device], Tensor] = {}


class UNet(nn.Module):
    """Predicts the noise (or v) in latents, given a timestep and the encoded prompt.

    The state dict has the names of the original checkpoints without ``model.diffusion_model.``; 1x1
    convolutions hold 2-D weights.
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        channels, time_dim, groups = config.block_out_channels, config.time_dim, config.norm_groups
        self.time_embed = nn.Sequential(Linear(channels[0], time_dim), nn.SiLU(), Linear(time_dim, time_dim))
        if config.vector_dim:
            embed = nn.Sequential(Linear(config.vector_dim, time_dim), nn.SiLU(), Linear(time_dim, time_dim))
            self.label_emb = nn.Sequential(embed)

        def transformer(level: int, depth: int) -> SpatialTransformer:
            return SpatialTransformer(channels[level], config.context_dim, config.num_heads[level], depth, groups)

        def stage(level: int, in_channels: int) -> list[nn.Module]:
            layers: list[nn.Module] = [ResBlock(in_channels, channels[level], time_dim, groups)]
            if depth := config.transformer_layers[level]:
                layers.append(transformer(level, depth))
            return layers

        width = channels[0]
        blocks = [Stage([Conv2d(config.in_channels, width, 3, padding=1)])]
        skips = [width]
        for level, out in enumerate(channels):
            for _ in range(config.layers_per_block):
                blocks.append(Stage(stage(level, width)))
                width = out
                skips.append(width)
            if level < len(channels) - 1:
                blocks.append(Stage([Downsample(width)]))
                skips.append(width)
        self.input_blocks = nn.ModuleList(blocks)

        self.middle_block = Stage(
            [
                ResBlock(width, width, time_dim, groups),
                transformer(-1, config.mid_transformer_layers),
                ResBlock(width, width, time_dim, groups),
            ]
        )

        blocks = []
        for level, out in reversed(list(enumerate(channels))):
            for i in range(config.layers_per_block + 1):
                layers = stage(level, width + skips.pop())
                width = out
                if level > 0 and i == config.layers_per_block:
                    layers.append(Upsample(width))
                blocks.append(Stage(layers))
        self.output_blocks = nn.ModuleList(blocks)
        self.out = nn.Sequential(
            GroupNorm(groups, width, 1e-5),
            nn.Identity(),
            Conv2d(width, config.out_channels, 3, padding=1),
        )

        self.cross_attentions = [m.attn2 for m in self.modules() if isinstance(m, TransformerBlock)]
        start = 0
        for attention in self.cross_attentions:
            stop = start + 2 * attention.to_k.out_features
            attention.place, start = slice(start, stop), stop

        self.emb_layers: nn.Module | None = None  # of all residual blocks, after :meth:`stack`

    def stack(self) -> None:
        """Makes one product of several that have the same input, where their weights are of one type: of
        self-attention's projections, and of the residual blocks' projections of the timestep's embedding. For GPUs,
        where fewer and larger launches pay."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.stack()
        blocks = [module for module in self.modules() if isinstance(module, ResBlock)]
        self.emb_layers = stacked([block.emb_layers[1] for block in blocks])
        if self.emb_layers is not None:
            start = 0
            for block in blocks:
                stop = start + block.out_channels
                block.place, start = slice(start, stop), stop
                del block.emb_layers

    def forward(self, latents: Tensor, timesteps: Tensor, context: Tensor, vector: Tensor | None = None) -> Tensor:
        """latents [B, in_channels, H, W], timesteps [B], context [B, M, context_dim], vector [B, vector_dim]
        -> prediction [B, out_channels, H, W] in the dtype of latents."""
        return self.step(latents, timesteps, self.project(context), vector)

    def project(self, context: Tensor) -> Tensor:
        """The keys and values that all cross-attentions take from the prompt: context [B, M, context_dim] -> [B, M, …].
        They are the same at every step."""
        return torch.cat([attention.project(context) for attention in self.cross_attentions], dim=-1)

    def step(self, latents: Tensor, timesteps: Tensor, projected: Tensor, vector: Tensor | None = None) -> Tensor:
        """As :meth:`forward`, the prompt given by its keys and values from :meth:`project`."""
        emb = timestep_embedding(timesteps, self.config.block_out_channels[0]).to(latents.dtype)
        emb = self.time_embed(emb)
        if self.config.vector_dim:
            if vector is None:
                raise ValueError("this UNet needs a vector of pooled text and sizes")
            emb = emb + self.label_emb(vector)
        emb = nn.functional.silu(emb)
        if self.emb_layers is not None:
            emb = self.emb_layers(emb)

        h = latents.contiguous(memory_format=torch.channels_last)
        skips: list[Tensor] = []
        for block in self.input_blocks:
            h = block(h, emb, projected, (0, 0))
            skips.append(h)
        h = self.middle_block(h, emb, projected, (0, 0))
        for block in self.output_blocks:
            h = torch.cat([h, skips.pop()], dim=1)
            size = (skips[-1].shape[2], skips[-1].shape[3]) if skips else (0, 0)
            h = block(h, emb, projected, size)
        return self.out(h)
