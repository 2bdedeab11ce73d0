"""The autoencoders in little memory.

Bands of rows pass through the layers one after the other; see :mod:`gguf_sd.models.kl_bands`.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from gguf_sd.models import kl_bands
from gguf_sd.models import row_bands as stream
from gguf_sd.models.kl_bands import Limits
from gguf_sd.models.row_bands import Rows
from gguf_sd.models.tiny_vae import WIDTH, Block, TinyAutoencoder
from gguf_sd.models.vae import Autoencoder


@torch.no_grad()
def decode(vae: Autoencoder | TinyAutoencoder, latents: Tensor, tile: int | None) -> Tensor:
    """Scaled latents [B, 4, h, w], as the UNet gives them -> images [B, 3, 8h, 8w], about -1 … 1.

    ``tile``: None for the whole picture at once, or the edge of a tile in latent pixels, see above.
    Raises GgufSdError for a tile below 1."""
    limits = Limits.of(vae.config, tile, latents.shape[2], latents.shape[3])
    if limits is None:
        return vae.decode(latents)
    if isinstance(vae, TinyAutoencoder):
        return torch.cat([_decode_tiny(vae, latent[None], limits) for latent in latents])
    return torch.cat([kl_bands.decode(vae, latent[None], limits) for latent in latents])


@torch.no_grad()
def encode(vae: Autoencoder | TinyAutoencoder, images: Tensor, tile: int | None) -> tuple[Tensor, Tensor]:
    """Images [B, 3, H, W] in -1 … 1 -> mean and standard deviation [B, 4, H/8, W/8] of the unscaled latents.

    ``tile`` as for :func:`decode`. Raises GgufSdError for a tile below 1, and for an autoencoder that only decodes."""
    scale = vae.config.downscale
    limits = Limits.of(vae.config, tile, images.shape[2] // scale, images.shape[3] // scale)
    if limits is None:
        return vae.encode(images)
    if isinstance(vae, TinyAutoencoder):
        encoded = [_encode_tiny(vae, image[None], limits) for image in images]
    else:
        encoded = [kl_bands.encode(vae, image[None], limits) for image in images]
    means, deviations = zip(*encoded, strict=True)
    return torch.cat(means), torch.cat(deviations)


def _decode_tiny(vae: TinyAutoencoder, latents: Tensor, limits: Limits) -> Tensor:
    z = latents.contiguous(memory_format=torch.channels_last)
    rows = _sequence(stream.bands(z, limits.band, WIDTH), vae.decoder, limits.band)
    scale = vae.config.downscale
    shape = 1, vae.config.in_channels, scale * latents.shape[2], scale * latents.shape[3]
    return kl_bands.assembled(rows, shape).mul_(2).sub_(1)


def _encode_tiny(vae: TinyAutoencoder, image: Tensor, limits: Limits) -> tuple[Tensor, Tensor]:
    picture = (image / 2 + 0.5).contiguous(memory_format=torch.channels_last)
    rows = _sequence(stream.bands(picture, limits.band, WIDTH), vae.trained_encoder(), limits.band)
    mean = torch.cat(list(rows), 2)
    return mean, torch.zeros_like(mean)


def _sequence(rows: Rows, layers: nn.Sequential, values: int) -> Rows:
    """A tiny autoencoder's half in one pass: it has no norms, so nothing is ever needed of the whole map."""
    left = list(layers)
    while left:
        layer = left.pop(0)
        if isinstance(layer, nn.Upsample):
            rows = stream.upsampled(rows, _conv(left.pop(0)), values)
        elif isinstance(layer, nn.Conv2d):
            rows = _convolved(rows, layer, values)
        elif isinstance(layer, Block):
            rows = map(torch.relu_, stream.residual(rows, partial(_sequence, layers=layer.conv, values=values)))
        else:
            rows = map(layer, rows)  # ReLU, Clamp
    return rows


def _convolved(rows: Rows, conv: nn.Conv2d, values: int) -> Rows:
    if conv.stride[0] == 1:
        return stream.convolved(rows, conv)
    return stream.rebanded(stream.strided(rows, conv), values)


def _conv(layer: nn.Module) -> nn.Conv2d:
    assert isinstance(layer, nn.Conv2d)
    return layer
