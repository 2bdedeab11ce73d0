"""The conditional UNet of Stable Diffusion 1.x and XL, module names as in the original (LDM) checkpoints.

Its way down and its middle are a module of their own, of which a ControlNet is made too, see
:mod:`gguf_sd.models.controlnet`. Activations are channels-last throughout, see :mod:`gguf_sd.models.unet_blocks`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from gguf_sd.config import UNetConfig
from gguf_sd.models.layers import Conv2d, GroupNorm, Linear, stacked
from gguf_sd.models.unet_blocks import (
    Attention,
    Downsample,
    ResBlock,
    SpatialTransformer,
    Stage,
    TransformerBlock,
    Upsample,
    as_often,
)


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


class UNetEncoder(nn.Module):
    """A UNet's way down and its middle.

    The state dict has the names of the original checkpoints without their prefix; 1x1 convolutions hold 2-D weights.
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        channels, time_dim, groups = config.block_out_channels, config.time_dim, config.norm_groups
        self.time_embed = nn.Sequential(Linear(channels[0], time_dim), nn.SiLU(), Linear(time_dim, time_dim))
        if config.vector_dim:
            embed = nn.Sequential(Linear(config.vector_dim, time_dim), nn.SiLU(), Linear(time_dim, time_dim))
            self.label_emb = nn.Sequential(embed)

        width = channels[0]
        blocks = [Stage([Conv2d(config.in_channels, width, 3, padding=1)])]
        self.skips = [width]  # channels of what each block of the way down gives
        for level, out in enumerate(channels):
            for _ in range(config.layers_per_block):
                blocks.append(Stage(self._stage(level, width)))
                width = out
                self.skips.append(width)
            if level < len(channels) - 1:
                blocks.append(Stage([Downsample(width)]))
                self.skips.append(width)
        self.input_blocks = nn.ModuleList(blocks)
        self.middle_block = Stage(
            [
                ResBlock(width, width, time_dim, groups),
                self._transformer(-1, config.mid_transformer_layers),
                ResBlock(width, width, time_dim, groups),
            ]
        )
        self.emb_layers: nn.Module | None = None  # of all residual blocks, after :meth:`stack`

    def _transformer(self, level: int, depth: int) -> SpatialTransformer:
        config = self.config
        width, heads = config.block_out_channels[level], config.num_heads[level]
        return SpatialTransformer(width, config.context_dim, heads, depth, config.norm_groups)

    def _stage(self, level: int, in_channels: int) -> list[nn.Module]:
        config = self.config
        out = config.block_out_channels[level]
        layers: list[nn.Module] = [ResBlock(in_channels, out, config.time_dim, config.norm_groups)]
        if depth := config.transformer_layers[level]:
            layers.append(self._transformer(level, depth))
        return layers

    def _find_cross_attentions(self) -> None:
        """Once all blocks are there: gives each cross-attention its place among the keys and values of all."""
        self.cross_attentions = [m.attn2 for m in self.modules() if isinstance(m, TransformerBlock)]
        start = 0
        for attention in self.cross_attentions:
            stop = start + 2 * attention.to_k.out_features
            attention.place, start = slice(start, stop), stop

    def stack(self) -> None:
        """Makes one product of several that have the same input, where their weights are of one type: of
        self-attention's projections, and of the residual blocks' projections of the timestep's embedding. For GPUs,
        where fewer and larger launches pay."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.stack()
        if self.emb_layers is not None:
            return
        blocks = [module for module in self.modules() if isinstance(module, ResBlock)]
        self.emb_layers = stacked([block.emb_layers[1] for block in blocks])
        if self.emb_layers is not None:
            start = 0
            for block in blocks:
                stop = start + block.out_channels
                block.place, start = slice(start, stop), stop
                del block.emb_layers

    def project(self, context: Tensor) -> Tensor:
        """The keys and values that all cross-attentions take from the prompt: context [B, M, context_dim] -> [B, M, …].
        They are the same at every step."""
        return torch.cat([attention.project(context) for attention in self.cross_attentions], dim=-1)

    def embed(self, timesteps: Tensor, vector: Tensor | None, dtype: torch.dtype) -> Tensor:
        """What the residual blocks take: timesteps [B], vector [B, vector_dim] -> [B, time_dim] or, once stacked, all
        blocks' projections of it. Raises ValueError where a vector is needed and there is none."""
        emb = timestep_embedding(timesteps, self.config.block_out_channels[0]).to(dtype)
        emb = self.time_embed(emb)
        if self.config.vector_dim:
            if vector is None:
                raise ValueError("this UNet needs a vector of pooled text and sizes")
            emb = emb + self.label_emb(vector)
        emb = nn.functional.silu(emb)
        return emb if self.emb_layers is None else self.emb_layers(emb)

    def down(
        self, h: Tensor, emb: Tensor, projected: Tensor, hint: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """Latents, channels-last, to what each block of the way down gives, and what the middle gives; ``hint`` is
        added behind the first convolution. Fewer latents than prompts stand for all of them in turn, and what does not
        depend on the prompts, up to the first cross-attention, is computed once."""
        skips: list[Tensor] = []
        for block in self.input_blocks:
            h = block(h, as_often(emb, h), projected, (0, 0))
            if hint is not None and not skips:
                h = h + hint
            skips.append(h)
        h = as_often(h, projected)
        return [as_often(x, h) for x in skips], self.middle_block(h, as_often(emb, h), projected, (0, 0))


class UNet(UNetEncoder):
    """Predicts the noise (or v) in latents, given a timestep and the encoded prompt."""

    def __init__(self, config: UNetConfig):
        super().__init__(config)
        channels, skips = config.block_out_channels, list(self.skips)
        width = channels[-1]
        blocks = []
        for level, out in reversed(list(enumerate(channels))):
            for i in range(config.layers_per_block + 1):
                layers = self._stage(level, width + skips.pop())
                width = out
                if level > 0 and i == config.layers_per_block:
                    layers.append(Upsample(width))
                blocks.append(Stage(layers))
        self.output_blocks = nn.ModuleList(blocks)
        self.out = nn.Sequential(
            GroupNorm(config.norm_groups, width, 1e-5),
            nn.Identity(),
            Conv2d(width, config.out_channels, 3, padding=1),
        )
        self._find_cross_attentions()

    def forward(self, latents: Tensor, timesteps: Tensor, context: Tensor, vector: Tensor | None = None) -> Tensor:
        """latents [B, in_channels, H, W], timesteps [B], context [B, M, context_dim], vector [B, vector_dim]
        -> prediction [B, out_channels, H, W] in the dtype of latents."""
        return self.step(latents, timesteps, self.project(context), vector)

    def step(
        self,
        latents: Tensor,
        timesteps: Tensor,
        projected: Tensor,
        vector: Tensor | None = None,
        *,
        control: Sequence[Tensor] = (),
    ) -> Tensor:
        """As :meth:`forward`, the prompts given by their keys and values from :meth:`project`, and latents and
        timesteps as often or, where prompts alone differ, once for several, see :meth:`UNetEncoder.down`. ``control``,
        of ControlNets: what is added to the results of each block of the way down, and, the last, to the middle's."""
        emb = self.embed(timesteps, vector, latents.dtype)
        skips, h = self.down(latents.contiguous(memory_format=torch.channels_last), emb, projected)
        if control:
            *added, middle = control
            skips, h = [skip + x for skip, x in zip(skips, added, strict=True)], h + middle
        emb = as_often(emb, h)
        for block in self.output_blocks:
            h = torch.cat([h, skips.pop()], dim=1)
            size = (skips[-1].shape[2], skips[-1].shape[3]) if skips else (0, 0)
            h = block(h, emb, projected, size)
        return self.out(h)
