"""The KL autoencoder over bands of rows, with the whole map's statistics at every group norm.

A group norm needs the moments of the whole map before the first band can pass it. So a resnet block is two or three
passes over its input, which is stored, or itself computed from something smaller on every pass.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from gguf_sd.config import VAEConfig
from gguf_sd.errors import GgufSdError
from gguf_sd.models import row_bands as stream
from gguf_sd.models.row_bands import DerivedMap, Map, Moments, Operator, Rows, StoredMap
from gguf_sd.models.unet_blocks import feature_map, tokens
from gguf_sd.models.vae import AttnBlock, Autoencoder, Downsample, Level, Mid, ResnetBlock, Upsample, query_chunks


class Store(Enum):
    """How much of a resnet block is in memory whole while it is computed, in maps of its output's size."""

    TWO = 2  # what its first convolution made, and its shortcut: nothing is computed twice
    ONE = 1  # its output alone: the first convolution runs a second time, once its output's moments are known
    NOTHING = 0  # every later pass computes the block anew


@dataclass(frozen=True)
class Limits:
    """What a tile's size comes to, for a picture of one size. All counts are of numbers, not of bytes."""

    band: int  # what a band of a map holds at most
    maps: int  # what the maps of a level may hold, in all

    @classmethod
    def of(cls, config: VAEConfig, tile: int | None, height: int, width: int) -> Limits | None:
        """For latents of height x width; None: the picture is not divided. Raises GgufSdError for a tile below 1."""
        if tile is not None and tile < 1:
            raise GgufSdError(f"a VAE tile of {tile} was asked for; it takes an edge of 1 latent pixel or more")
        if tile is None or (tile >= height and tile >= width):
            return None
        finest = config.block_out_channels[0] * config.downscale**2
        area, picture = tile * tile, height * width
        maps = 2 * picture if 16 * area > picture else picture if 256 * area > picture else picture // 2
        return cls(finest * area, finest * maps)

    def level(self, values: int, finest: bool) -> tuple[Store, int]:
        """For a level whose maps hold ``values``: how its blocks are computed, and what a band may hold. Only the
        finest level is computed anew on every pass. About eight bands are alive at a time: where maps are small there
        is room for large ones, which is faster."""
        if 2 * values <= self.maps:
            store = Store.TWO
        else:
            store = Store.ONE if values <= self.maps or not finest else Store.NOTHING
        return store, max(self.band, (self.maps - store.value * values) // 8)


def decode(vae: Autoencoder, latents: Tensor, limits: Limits) -> Tensor:
    """One picture through the KL autoencoder."""
    decoder, scale = vae.decoder, vae.config.downscale
    z = vae.post_quant_conv((latents / vae.config.scaling_factor).contiguous(memory_format=torch.channels_last))
    pixels, width = z[0, 0].numel(), decoder.conv_in.out_channels
    bands = stream.bands(z, limits.level(pixels * width, False)[1], width)
    x: Map = _mid(decoder.mid, StoredMap(stream.convolved(bands, decoder.conv_in)), limits)
    enlarge: Upsample | nn.Module = nn.Identity()
    for level in cast(Iterable[Level], reversed(decoder.up)):
        store, values = limits.level(pixels * level.width, level is decoder.up[0])
        if isinstance(enlarge, Upsample):
            x = DerivedMap(x, partial(stream.upsampled, conv=enlarge.conv, values=values))
        for block in cast(Iterable[ResnetBlock], level.block):
            x = _resnet(block, x, store)
        enlarge, pixels = level.upsample, 4 * pixels
    rows = _norm_conv(decoder.norm_out, decoder.conv_out, x.moments)(x.drain())
    return assembled(rows, (1, vae.config.in_channels, scale * latents.shape[2], scale * latents.shape[3]))


def encode(vae: Autoencoder, image: Tensor, limits: Limits) -> tuple[Tensor, Tensor]:
    """One picture through the KL autoencoder."""
    encoder = vae.encoder
    pixels = image[0, 0].numel()
    picture = image.contiguous(memory_format=torch.channels_last)
    source = StoredMap(stream.bands(picture, limits.band, encoder.conv_in.out_channels))
    x: Map = DerivedMap(source, partial(stream.convolved, conv=encoder.conv_in))
    shrink: Downsample | nn.Module = nn.Identity()
    for level in cast(Iterable[Level], encoder.down):
        store, values = limits.level(pixels * level.width, level is encoder.down[0])
        if isinstance(shrink, Downsample):
            x = StoredMap(stream.rebanded(stream.strided(x.drain(), shrink.conv, (0, 1, 0, 1)), values))
        for block in cast(Iterable[ResnetBlock], level.block):
            x = _resnet(block, x, store)
        shrink, pixels = level.downsample, pixels // 4
    x = _mid(encoder.mid, x, limits)
    rows = _norm_conv(encoder.norm_out, encoder.conv_out, x.moments)(x.drain())
    return vae.distribution(torch.cat(list(rows), 2))


def assembled(rows: Rows, shape: tuple[int, ...]) -> Tensor:
    """The map that the bands make up, written into as they come."""
    whole, top = None, 0
    for band in rows:
        if whole is None:
            whole = band.new_empty(shape)
        whole[:, :, top : top + band.shape[2]] = band
        top += band.shape[2]
        del band
    assert whole is not None
    return whole


def _norm_conv(norm: nn.GroupNorm, conv: nn.Conv2d, moments: Moments) -> Operator:
    return lambda rows: stream.convolved(stream.normed(rows, moments, norm), conv)


def _resnet(block: ResnetBlock, x: Map, store: Store) -> Map:
    """Passes over ``x`` for the moments of each group norm, and one to compute the output."""
    first = _norm_conv(block.norm1, block.conv1, x.moments)
    waiting: deque[Tensor] = deque()
    if store is Store.TWO:
        h = StoredMap(first(stream.noted(x.drain(), waiting, block.nin_shortcut)))
        second = _norm_conv(block.norm2, block.conv2, h.moments)
        return StoredMap(stream.added(second(h.drain()), waiting))
    second = _norm_conv(block.norm2, block.conv2, DerivedMap(x, first).moments)
    if store is Store.ONE:
        rows = second(first(stream.noted(x.drain(), waiting, block.nin_shortcut)))
        return StoredMap(stream.added(rows, waiting))
    return DerivedMap(x, lambda rows: stream.residual(rows, lambda band: second(first(band)), block.nin_shortcut))


def _mid(mid: Mid, x: Map, limits: Limits) -> Map:
    x = _resnet(mid.block_1, x, Store.TWO)
    return _resnet(mid.block_2, _attended(mid.attn_1, x, 4 * limits.band), Store.TWO)


def _attended(block: AttnBlock, x: Map, scores: int) -> StoredMap:
    """Keys and values of the whole map, the queries of a band at a time, and about ``scores`` at once."""
    norm = partial(stream.normed, moments=x.moments, norm=block.norm, silu=False)
    pairs = [(block.k(tokens(band)), block.v(tokens(band))) for band in norm(x.rows())]
    k, v = (torch.cat(parts, 1)[:, None] for parts in zip(*pairs, strict=True))
    del pairs

    def attend(rows: Rows) -> Rows:
        for band in norm(rows):
            q = block.q(tokens(band))[:, None]
            yield feature_map(block.proj_out(query_chunks(q, k, v, scores)[:, 0]), band.shape[2], band.shape[3])

    return StoredMap(stream.residual(x.drain(), attend))
