"""The KL autoencoder: pictures to latents and back, module names as in the original (LDM) checkpoints."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gguf_sd.config import VAEConfig
from gguf_sd.models.layers import Conv2d, GroupNorm, Linear, Pointwise
from gguf_sd.models.unet_blocks import feature_map, tokens
from gguf_sd_kernels import ops

EPS = 1e-6
SCORES = 4096 * 4096  # of one picture in the attention of the middle at a time: all of those of 512x512 pixels


class ResnetBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm1 = GroupNorm(groups, in_channels, EPS)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = GroupNorm(groups, out_channels, EPS)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.nin_shortcut = nn.Identity() if same else Pointwise(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1.normed(self.norm1, x)
        return self.conv2.normed(self.norm2, h, residual=self.nin_shortcut(x))


def query_chunks(q: Tensor, k: Tensor, v: Tensor, scores: int = SCORES) -> Tensor:
    """Attention, as many queries at a time as have ``scores``: where torch has no fused kernel for heads this wide, it
    holds them all, and 1024x1024 pixels have 16384 x 16384."""
    parts = q.split(max(1, scores // k.shape[2]), 2)
    if len(parts) == 1:
        return ops.attention(q, k, v)
    return torch.cat([ops.attention(part, k, v) for part in parts], 2)


class AttnBlock(nn.Module):
    """Self-attention with one head over all pixels."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = GroupNorm(groups, channels, EPS, silu=False)
        self.q = Linear(channels, channels)
        self.k = Linear(channels, channels)
        self.v = Linear(channels, channels)
        self.proj_out = Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        h = tokens(self.norm(x))[:, None]
        h = query_chunks(self.q(h), self.k(h), self.v(h))
        return feature_map(self.proj_out(h[:, 0], tokens(x)), x.shape[2], x.shape[3])


class Mid(nn.Module):
    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups)
        self.attn_1 = AttnBlock(channels, groups)
        self.block_2 = ResnetBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Downsample(nn.Module):
    """Halves each side; the padding is one pixel on the right and the bottom only."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(nn.functional.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv.enlarged(x, (2 * x.shape[2], 2 * x.shape[3]))


class Level(nn.Module):
    """The resnet blocks of one resolution, then the change of resolution, if any."""

    def __init__(self, in_channels: int, out_channels: int, layers: int, groups: int):
        super().__init__()
        self.width = out_channels
        self.block = nn.ModuleList(
            ResnetBlock(in_channels if i == 0 else out_channels, out_channels, groups) for i in range(layers)
        )
        self.downsample: nn.Module = nn.Identity()
        self.upsample: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return self.upsample(self.downsample(x))


class Encoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        channels, groups = config.block_out_channels, config.norm_groups
        self.conv_in = Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.down = nn.ModuleList()
        width = channels[0]
        for i, out in enumerate(channels):
            level = Level(width, out, config.layers_per_block, groups)
            if i < len(channels) - 1:
                level.downsample = Downsample(out)
            self.down.append(level)
            width = out
        self.mid = Mid(width, groups)
        self.norm_out = GroupNorm(groups, width, EPS)
        self.conv_out = Conv2d(width, 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(self.norm_out(self.mid(x)))


class Decoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        channels, groups = config.block_out_channels, config.norm_groups
        width = channels[-1]
        self.conv_in = Conv2d(config.latent_channels, width, 3, padding=1)
        self.mid = Mid(width, groups)
        levels = []
        for i, out in reversed(list(enumerate(channels))):
            level = Level(width, out, config.layers_per_block + 1, groups)
            if i > 0:
                level.upsample = Upsample(out)
            levels.append(level)
            width = out
        self.up = nn.ModuleList(reversed(levels))  # the checkpoint numbers them by resolution, finest first
        self.norm_out = GroupNorm(groups, width, EPS)
        self.conv_out = Conv2d(width, config.in_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(self.norm_out(x))


class Autoencoder(nn.Module):
    """State dict names are those of the original checkpoints without ``first_stage_model.``; 1x1 convolutions
    hold 2-D weights."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = Pointwise(2 * config.latent_channels, 2 * config.latent_channels)
        self.post_quant_conv = Pointwise(config.latent_channels, config.latent_channels)

    def forget_encoder(self) -> None:
        """Lets what only encodes go, 0.4 of the weights: :meth:`encode` is no more."""
        del self.encoder, self.quant_conv

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, 3, H, W] in -1 … 1 -> mean and standard deviation [B, 4, H/8, W/8] of the *unscaled* latents
        (multiply by ``config.scaling_factor`` for the UNet)."""
        x = images.contiguous(memory_format=torch.channels_last)
        return self.distribution(self.encoder(x))

    def distribution(self, encoded: Tensor) -> tuple[Tensor, Tensor]:
        """What the encoder made, [B, 8, h, w] -> mean and standard deviation [B, 4, h, w]."""
        mean, log_variance = self.quant_conv(encoded).chunk(2, dim=1)
        return mean, (0.5 * log_variance.clamp(-30.0, 20.0)).exp()

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents [B, 4, h, w], as the UNet gives them -> images [B, 3, 8h, 8w], about -1 … 1."""
        z = (latents / self.config.scaling_factor).contiguous(memory_format=torch.channels_last)
        return self.decoder(self.post_quant_conv(z))
