"""How many bytes of activations a forward pass holds at most, worked out from a model's configuration.

The passes are walked through layer by layer as the modules run them, counting the values that are alive: what goes in,
what comes out, and what locals hold meanwhile. No tensor is made: tracing the modules under torch's fake tensors
finds the same bytes (:mod:`benchmarks.lib.trace_memory`, the tests hold both together), but takes seconds, and 150 MB
for what it imports.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from gguf_sd.config import ControlConfig, SafetyConfig, TextConfig, UNetConfig, VAEConfig
from gguf_sd.models.kl_bands import Limits
from gguf_sd_kernels.cpu.conv import MAX_PIXELS, MIN_WEIGHTS
from gguf_sd_kernels.cpu.linear import GEGLU_ROWS

TINY_WIDTH = 64  # channels of a tiny autoencoder, see gguf_sd.models.tiny_vae
FLOAT32 = 4
# On their way at a time through a VAE in bands: 2.3 by traces, and what convolutions work with in a process.
BANDS, PHASE_KERNELS = 3.4, 1.6
ENCODING = 1.12  # of decoding's: bands are joined and divided anew where a map shrinks
TINY_BANDS, TINY_KEPT = 15, 0.75  # through a tiny one, and the share of its finest map that is held besides


@dataclass(frozen=True)
class Engine:
    """What the operators take besides their operands."""

    itemsize: int  # bytes of a value that is computed with
    gpu: bool = False
    onednn: bool = True  # on a CPU: its products come from oneDNN
    decodes: bool = False  # weights lie in blocks and are decoded for each product

    def conv(self, inputs: int, outputs: int, kernel: int, before: int, after: int) -> int:
        """Values that a convolution works with, ``before`` and ``after`` the pixels on both sides of it: on a CPU the
        weight in oneDNN's own layout, or what each pixel sees; on a GPU the weight decoded."""
        weights = inputs * outputs * kernel * kernel
        if self.gpu:
            return weights if self.decodes else 0
        if after <= MAX_PIXELS and weights >= MIN_WEIGHTS:
            return inputs * (kernel * kernel * after + before)
        return weights

    def linear(self, inputs: int, outputs: int) -> int:
        return inputs * outputs if self.gpu and self.decodes else 0

    def geglu(self, rows: int, width: int) -> int:
        """Values of the product of ``rows`` with a GEGLU weight, result of ``width`` included."""
        if self.onednn and not self.gpu:
            return rows * width + 2 * min(rows, GEGLU_ROWS) * width
        whole, activated = 2 * rows * width, 2 * rows * width
        return whole + activated


class _Live:
    """Values alive in the course of a pass, and the most there were."""

    def __init__(self, held: int = 0):
        self.held = self.most = held

    def hold(self, values: int) -> None:
        """From now on; negative for what goes."""
        self.held += values
        self.most = max(self.most, self.held)

    def touch(self, values: int) -> None:
        """For a moment, besides what is held."""
        self.most = max(self.most, self.held + values)


def unet_step(
    config: UNetConfig,
    pictures: int,
    halves: int,
    size: tuple[int, int],
    tokens: int,
    engine: Engine,
    controls: Sequence[ControlConfig] = (),
) -> int:
    """Bytes of a step with ``halves`` of guidance in one call, 1 or 2, of latents of ``size`` (height, width), under
    ControlNets, which run before it one by one."""
    images = pictures * halves
    held = images * tokens * (projected_width(config) + sum(_taken(x.unet, True) for x in controls))
    pixels = list(_areas(size, len(config.block_out_channels), images))
    channels, latents = config.block_out_channels, images * size[0] * size[1] * config.in_channels
    live = _Live(held + 3 * latents + sum(size[0] * size[1] * x.unet.block_out_channels[0] for x in controls))
    for number, control in enumerate(controls):
        live.hold(_control(live, control, size, images, engine))
        if number:  # what the nets add is summed
            live.hold(-_residuals(control, size, images))
    skips = _down(live, config, pixels, engine)
    width = channels[-1]
    if controls:  # one sum after another: all those of the skips, then the UNet's own go
        live.touch(_residuals(controls[0], size, images))
    for level, out in reversed(list(enumerate(channels))):
        n = pixels[level]
        for i in range(config.layers_per_block + 1):
            skip, _ = skips.pop()
            joined = width + skip
            live.hold(n * joined)
            live.hold(-n * joined)  # h and its skip, once they are joined: as many values
            _stage(live, n, joined, out, config.transformer_layers[level], engine)
            result = n * out
            if level > 0 and i == config.layers_per_block:
                finer = pixels[level - 1]
                work = finer * out + engine.conv(out, out, 3, finer, finer)
                live.touch(n * out + finer * out + work)
                result = finer * out
            live.hold(result - n * joined)
            width = out
    live.touch(pixels[0] * (width + config.out_channels) + engine.conv(width, config.out_channels, 3, pixels[0], 0))
    return live.most * engine.itemsize


def _down(live: _Live, config: UNetConfig, pixels: Sequence[int], engine: Engine) -> list[tuple[int, int]]:
    """The way down and the middle, whose results are held; the width and the level of each but the middle's."""
    channels = config.block_out_channels
    width = channels[0]
    skips = [(width, 0)]
    live.touch(pixels[0] * width + engine.conv(config.in_channels, width, 3, pixels[0], pixels[0]))
    live.hold(pixels[0] * width)
    for level, out in enumerate(channels):
        for _ in range(config.layers_per_block):
            _stage(live, pixels[level], width, out, config.transformer_layers[level], engine)
            live.hold(pixels[level] * out)
            width = out
            skips.append((width, level))
        if level < len(channels) - 1:
            after = pixels[level + 1]
            live.touch(after * width + engine.conv(width, width, 3, pixels[level], after))
            live.hold(after * width)
            skips.append((width, level + 1))
    _middle(live, pixels[-1], width, config.mid_transformer_layers, engine)
    live.hold(pixels[-1] * width)
    return skips


def _control(live: _Live, config: ControlConfig, size: tuple[int, int], images: int, engine: Engine) -> int:
    """A ControlNet's step, and once before all steps its picture's way in; the values of what it gives."""
    hints, width = config.hint_channels, config.unet.block_out_channels[0]
    n = size[0] * size[1] * config.downscale**2
    picture = 2 * n * config.picture_channels
    live.touch(picture + n * hints[0] + engine.conv(config.picture_channels, hints[0], 3, n, n))
    for channels, out in pairwise(hints):
        live.touch(picture + 2 * n * channels + engine.conv(channels, channels, 3, n, n))
        live.touch(picture + n * channels + n // 4 * out + engine.conv(channels, out, 3, n, n // 4))
        n //= 4
    live.touch(picture + n * (hints[-1] + width) + engine.conv(hints[-1], width, 3, n, n))
    before, given = live.held, _residuals(config, size, images)
    _down(live, config.unet, list(_areas(size, len(config.unet.block_out_channels), images)), engine)
    live.hold(given)
    live.hold(before - live.held)  # all of it
    return given


def _residuals(config: ControlConfig, size: tuple[int, int], images: int) -> int:
    """Values that a ControlNet gives: as many as the results of the way down and the middle."""
    channels, layers = config.unet.block_out_channels, config.unet.layers_per_block
    pixels = list(_areas(size, len(channels), images))
    total = pixels[0] * channels[0] + pixels[-1] * channels[-1]
    for level, width in enumerate(channels):
        total += layers * pixels[level] * width
        total += pixels[level + 1] * width if level < len(channels) - 1 else 0
    return total


def projected_width(config: UNetConfig) -> int:
    """Keys and values that all cross-attentions take of a token."""
    return _taken(config, False)


def _taken(config: UNetConfig, down: bool) -> int:
    """The same; of the way ``down`` and the middle alone."""
    layers, channels = config.transformer_layers, config.block_out_channels
    total = config.mid_transformer_layers * channels[-1]
    for depth, width in zip(layers, channels, strict=True):
        total += depth * width * (config.layers_per_block if down else 2 * config.layers_per_block + 1)
    return 2 * total


def _areas(size: tuple[int, int], levels: int, images: int) -> Iterator[int]:
    """Pixels of all images at each level."""
    height, width = size
    for _ in range(levels):
        yield images * height * width
        height, width = (height + 1) // 2, (width + 1) // 2


def _stage(live: _Live, n: int, before: int, after: int, depth: int, engine: Engine) -> None:
    """A residual block and what follows it, their input held by the caller."""
    live.touch(_res_block(n, before, after, engine))
    if depth:
        live.touch(n * after + _transformer(n, after, engine))


def _middle(live: _Live, n: int, width: int, depth: int, engine: Engine) -> None:
    live.touch(_res_block(n, width, width, engine))
    live.touch(n * width + max(_transformer(n, width, engine), _res_block(n, width, width, engine)))


def _res_block(n: int, before: int, after: int, engine: Engine) -> int:
    """Norm and convolution; then norm, shortcut and convolution, with the first one's result still there."""
    first = n * (before + after) + engine.conv(before, after, 3, n, n)
    shortcut = 0 if before == after else n * after
    second = 3 * n * after + shortcut + engine.conv(after, after, 3, n, n)
    return max(first, second)


def _transformer(n: int, dim: int, engine: Engine) -> int:
    """Beside the feature map: what went into the blocks, and in a block what attention or the feed-forward holds."""
    attention = n * dim * 7  # that, its norm, q, k, v, what is attended to, and the result
    inside = n * dim * 3 + engine.geglu(n, 4 * dim) + engine.linear(dim, 8 * dim)
    behind = n * dim * 8 + engine.linear(4 * dim, dim)
    return max(attention, inside, behind)


def vae_decode(config: VAEConfig, size: tuple[int, int], engine: Engine, tiny: bool = False) -> int:
    """Bytes of decoding one picture's latents of ``size`` (height, width)."""
    if tiny:
        return _tiny(size, engine)
    channels, layers = config.block_out_channels, config.layers_per_block + 1
    n, width = size[0] * size[1], channels[-1]
    live = _Live(2 * n * config.latent_channels)
    live.hold(n * width)
    _vae_middle(live, n, width, engine)
    for level, out in reversed(list(enumerate(channels))):
        live.hold(_vae_level(live, n, width, out, layers, engine))
        given, width = width, out
        if level > 0:
            live.touch(8 * n * out + engine.conv(out, out, 3, 4 * n, 4 * n))
            live.hold(4 * n * out - n * out)
            live.hold(-n * given)
            n *= 4
        else:
            live.hold(-n * given)
    live.touch(n * (width + config.in_channels) + engine.conv(width, config.in_channels, 3, n, n))
    return live.most * engine.itemsize


def vae_encode(config: VAEConfig, size: tuple[int, int], engine: Engine, tiny: bool = False) -> int:
    """Bytes of encoding one picture to latents of ``size`` (height, width)."""
    if tiny:
        return _tiny(size, engine)
    channels, width = config.block_out_channels, config.block_out_channels[0]
    n = size[0] * size[1] * config.downscale**2
    live = _Live(2 * n * config.in_channels)
    live.hold(n * width)
    for level, out in enumerate(channels):
        live.hold(_vae_level(live, n, width, out, config.layers_per_block, engine))
        given, width = width, out
        if level < len(channels) - 1:
            live.touch(n * out + n // 4 * out + engine.conv(out, out, 3, n, n // 4))
            live.hold(n // 4 * out - n * out)
            live.hold(-n * given)
            n //= 4
        else:
            live.hold(-n * given)
    _vae_middle(live, n, width, engine)
    return live.most * engine.itemsize


def _vae_level(live: _Live, n: int, before: int, after: int, layers: int, engine: Engine) -> int:
    """The residual blocks of a level, whose input the caller holds throughout; returns the values of what comes out."""
    live.touch(_res_block(n, before, after, engine))
    if layers > 1:
        live.touch(n * after + _res_block(n, after, after, engine))
    return n * after


def _vae_middle(live: _Live, n: int, width: int, engine: Engine) -> None:
    """Residual block, attention with one head, residual block; their input is held throughout."""
    block = _res_block(n, width, width, engine)
    live.touch(max(block, n * width + max(5 * n * width, block)))


def _tiny(size: tuple[int, int], engine: Engine) -> int:
    """At its finest: a block's input, a convolution's map and its activation."""
    n = 64 * size[0] * size[1]
    return (3 * n * TINY_WIDTH + engine.conv(TINY_WIDTH, TINY_WIDTH, 3, n, n)) * engine.itemsize


def vae_banded(
    config: VAEConfig, size: tuple[int, int], tile: int, engine: Engine, tiny: bool = False, encodes: bool = False
) -> int:
    """Bytes of decoding (or encoding) one picture in bands, as :mod:`gguf_sd.models.kl_bands` does: the
    maps that are kept whole, the bands on their way, and the four kernels that an enlarging convolution is made into.
    Fitted to traces at 512x512 with tiles of 8 to 48, and to what a process took with one of 48."""
    limits = Limits.of(config, tile, *size)
    if limits is None:
        return max(vae_decode(config, size, engine, tiny), vae_encode(config, size, engine, tiny))
    if tiny:
        kept = int(TINY_KEPT * size[0] * size[1] * TINY_WIDTH * config.downscale**2)
        return (kept + TINY_BANDS * limits.band) * engine.itemsize
    kernels = int(PHASE_KERNELS * 16 * max(config.block_out_channels) ** 2)
    decoding = (limits.maps + int(BANDS * limits.band) + kernels) * engine.itemsize
    return int(ENCODING * decoding) if encodes else decoding


def text_encode(config: TextConfig, chunks: int, engine: Engine) -> int:
    """Bytes of encoding ``chunks`` chunks of a prompt at once."""
    tokens = chunks * config.max_position_embeddings
    return tokens * (5 * config.hidden_size + 3 * config.intermediate_size) * engine.itemsize


def safety_check(config: SafetyConfig, engine: Engine) -> int:
    """Bytes of looking at one picture."""
    tokens = (config.image_size // config.patch_size) ** 2 + 1
    values = tokens * (5 * config.hidden_size + 3 * config.intermediate_size)
    return (values + 3 * config.image_size**2) * engine.itemsize


def finest_values(config: VAEConfig, size: tuple[int, int]) -> int:
    """Values of the largest map that a residual block of a decoder takes, for latents of ``size``."""
    channels = config.block_out_channels
    return channels[min(1, len(channels) - 1)] * size[0] * size[1] * config.downscale**2


def joined_values(config: UNetConfig, images: int, size: tuple[int, int]) -> int:
    """Values of the largest map that a residual block of a UNet takes: with its skip, at full size."""
    channels = config.block_out_channels
    return images * size[0] * size[1] * (channels[0] + channels[min(1, len(channels) - 1)])


def finished_pixels(pictures: int, size: tuple[int, int], downscale: int) -> int:
    """Bytes of decoded pictures on their way to 8 bits, all of a batch at once."""
    return 4 * 3 * FLOAT32 * pictures * size[0] * size[1] * downscale**2
