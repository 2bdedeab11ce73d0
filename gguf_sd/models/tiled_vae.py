"""The autoencoders in little memory: pictures in bands of rows, equal to the whole picture's but for rounding.

``tile`` is the edge of a square of latent pixels. As many values as its square of pixels has at the finest level, an
area, pass through the layers at a time, as bands across the picture's whole width: they have half the borders that
squares have, and each border hands over the rows that the next band needs, so that there is nothing to blend. Tiles of
the usual kind, overlapping and each with group norm statistics of its own (diffusers, 16 latent pixels), came out at
13 dB with the demo's autoencoder, with gradients at a border up to 290 times as strong; bands at 102 dB and 1.001.

How the KL autoencoder fares with its group norms says :mod:`gguf_sd.models.kl_bands`: beside the bands it keeps two of
its finest maps (of 512x512 pixels in float32 134 MB each); with a tile of at most a sixteenth of the picture, one; of
at most a 256th, half a map. The tiny autoencoder has no norms, and keeps nothing.

Most bytes alive at a time, in MB, weights not counted, whole and with tiles (SD 1.5's and SDXL's autoencoder):

    decode  512x512   float32    whole 805    32: 358    16: 174    8: 164
    encode  512x512   float32    whole 674    32: 340    16: 181    8: 149
    decode  1024x1024 bfloat16   whole 1611   32: 443    16: 302
    encode  1024x1024 bfloat16   whole 1348   32: 449    16: 309
    TAESD decode 512x512 float32 whole 201    32: 224    16: 112    8: 64

Processor time of a decode of 512x512 against the whole (float32, AVX2, one core of a busy machine): 1.06 with a tile of
32, 1.15 with 16, 1.24 with 8. The norms' extra passes are paid for by enlarging with 4/9 of the products, see
:func:`gguf_sd.models.row_bands.upsampled`.
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
