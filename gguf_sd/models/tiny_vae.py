"""TAESD, the tiny autoencoder: a hundredth of the work of the real one, for previews and small machines.

Ollin Boer Bohan, https://github.com/madebyollin/taesd (MIT): convolutions, ReLU and residual blocks, 64 channels
throughout, trained to imitate the encoder and the decoder of one model family (TAESD: SD 1.x, TAESDXL: SDXL).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gguf_sd.config import VAEConfig
from gguf_sd.errors import GgufSdError
from gguf_sd.models.layers import Conv2d

WIDTH = 64
BLOCKS = 3  # residual blocks a resolution; one at the finest
LEVELS = 4
LIMIT = 3.0  # latents are squeezed into -3 … 3 before they are decoded


class Clamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / LIMIT) * LIMIT


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(_conv(), nn.ReLU(), _conv(), nn.ReLU(), _conv())

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x) + x)


def _conv(in_channels: int = WIDTH, out_channels: int = WIDTH, stride: int = 1, bias: bool = True) -> Conv2d:
    return Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=bias)


def _encoder(latent_channels: int) -> nn.Sequential:
    layers: list[nn.Module] = [_conv(3), Block()]
    for _ in range(LEVELS - 1):
        layers += [_conv(stride=2, bias=False), *(Block() for _ in range(BLOCKS))]
    return nn.Sequential(*layers, _conv(WIDTH, latent_channels))


def _decoder(latent_channels: int) -> nn.Sequential:
    layers: list[nn.Module] = [Clamp(), _conv(latent_channels), nn.ReLU()]
    for _ in range(LEVELS - 1):
        layers += [*(Block() for _ in range(BLOCKS)), nn.Upsample(scale_factor=2.0), _conv(bias=False)]
    return nn.Sequential(*layers, Block(), _conv(WIDTH, 3))


class TinyAutoencoder(nn.Module):
    """Takes the place of :class:`gguf_sd.models.vae.Autoencoder`. State dict names are ``encoder.`` and ``decoder.``
    before those of the published files (``0.weight``, ``1.conv.0.weight``, …).

    Its latents are the UNet's as they are, so ``config.scaling_factor`` is 1. ``source`` names the file in errors.
    """

    def __init__(self, latent_channels: int = 4, encodes: bool = True, source: str = "this tiny autoencoder"):
        super().__init__()
        self.config = tiny_config(latent_channels)
        self.source = source
        self.encoder = _encoder(latent_channels) if encodes else None
        self.decoder = _decoder(latent_channels)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, 3, H, W] in -1 … 1 -> latents [B, 4, H/8, W/8], and their standard deviation: zeros.

        Raises GgufSdError where only a decoder was loaded.
        """
        mean = self.trained_encoder()((images / 2 + 0.5).contiguous(memory_format=torch.channels_last))
        return mean, torch.zeros_like(mean)

    def trained_encoder(self) -> nn.Sequential:
        """The encoder. Raises GgufSdError where only a decoder was loaded."""
        if self.encoder is None:
            raise GgufSdError(
                f"{self.source} holds only the decoder of a tiny autoencoder, but a picture has to be encoded; "
                "put its encoder (taesd_encoder.safetensors) beside it, or choose another --vae"
            )
        return self.encoder

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents [B, 4, h, w], as the UNet gives them -> images [B, 3, 8h, 8w], about -1 … 1."""
        return self.decoder(latents.contiguous(memory_format=torch.channels_last)) * 2 - 1


def tiny_config(latent_channels: int) -> VAEConfig:
    """What of a tiny autoencoder the pipeline asks for: 8 pixels a latent, no scaling, fine in float16."""
    widths = (WIDTH,) * LEVELS
    return VAEConfig(latent_channels=latent_channels, block_out_channels=widths, scaling_factor=1.0)
