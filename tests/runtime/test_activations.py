"""Modelled activations against those that torch's fake tensors show when the modules run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from benchmarks.lib.trace_memory import traced_peak
from gguf_sd.config import SD15, SDXL, ControlConfig, UNetConfig, VAEConfig
from gguf_sd.models import tiled_vae
from gguf_sd.models.controlnet import ControlNet
from gguf_sd.models.text import TextEncoder
from gguf_sd.models.tiny_vae import TinyAutoencoder
from gguf_sd.models.unet import UNet, _known_frequencies
from gguf_sd.models.vae import Autoencoder
from gguf_sd.runtime import activations
from gguf_sd.runtime.activations import Engine
from gguf_sd.sampling.controlled import Controlled, Controller

SMALL = UNetConfig(block_out_channels=(64, 128, 128), transformer_layers=(1, 2, 0), num_heads=(4, 4, 4), context_dim=64)
NO_ATTENTION = replace(SMALL, transformer_layers=(0, 0, 0))


class Seen(Engine):
    """Without what oneDNN takes inside a convolution, which no tensor shows."""

    def conv(self, inputs: int, outputs: int, kernel: int, before: int, after: int) -> int:
        work = super().conv(inputs, outputs, kernel, before, after)
        return 0 if work == inputs * outputs * kernel * kernel else work


ENGINE = Seen(itemsize=4)


@pytest.mark.parametrize(
    ("config", "images", "size"),
    [
        (SMALL, 2, (40, 24)),
        (NO_ATTENTION, 1, (33, 19)),
        pytest.param(SD15.unet, 2, (64, 64), marks=pytest.mark.slow),
        pytest.param(SDXL.unet, 1, (128, 96), marks=pytest.mark.slow),
    ],
)
def test_unet_steps(config: UNetConfig, images: int, size: tuple[int, int]) -> None:
    width = activations.projected_width(config)

    def build() -> Callable[[], object]:
        unet = UNet(config).eval()
        latents, projected = torch.empty(images, config.in_channels, *size), torch.empty(images, 77, width)
        vector = torch.empty(images, config.vector_dim) if config.vector_dim else None
        return lambda: unet.step(latents, torch.empty(images), projected, vector)

    _known_frequencies.clear()  # those of other tests are no stand-ins
    given = images * (77 * width + 3 * config.in_channels * size[0] * size[1]) * 4
    modelled = activations.unet_step(config, images, 1, size, 77, ENGINE) - given
    assert modelled == pytest.approx(traced_peak(build), rel=0.02)
    halves = activations.unet_step(config, 1, images, size, 77, ENGINE)
    assert halves - given == modelled


@pytest.mark.parametrize(("nets", "size"), [(1, (40, 24)), (2, (24, 24)), (1, (9, 13))])
def test_steps_under_controlnets(nets: int, size: tuple[int, int]) -> None:
    control, images = ControlConfig("sd1", SMALL), 2
    widths = [activations.projected_width(SMALL), *[activations._taken(SMALL, True)] * nets]

    def build() -> Callable[[], object]:
        unet, own = UNet(SMALL).eval(), [ControlNet(control).eval() for _ in range(nets)]
        picture, latents = torch.empty(1, 3, 8 * size[0], 8 * size[1]), torch.empty(images, 4, *size)
        projected = torch.empty(images, 77, sum(widths))

        def run() -> None:
            steered = Controlled(unet, [Controller(net, picture, 1.0, 0.0, 1.0) for net in own], 1, 1)
            steered.widths = widths
            steered.step(latents, torch.empty(images), projected)

        return run

    _known_frequencies.clear()
    given = images * (77 * sum(widths) + 3 * 4 * size[0] * size[1]) * 4
    modelled = activations.unet_step(SMALL, images, 1, size, 77, ENGINE, [control] * nets) - given
    assert modelled == pytest.approx(traced_peak(build), rel=0.1)


SMALL_VAE = VAEConfig(block_out_channels=(32, 64, 64, 64))


@pytest.mark.parametrize("encodes", [False, True])
@pytest.mark.parametrize("tiny", [False, True])
@pytest.mark.parametrize("tile", [None, 16, 8])
def test_autoencoders(tiny: bool, encodes: bool, tile: int | None) -> None:
    """Exactly where whole, within a margin above in bands."""
    size = 40, 36

    def build() -> Callable[[], object]:
        vae = (TinyAutoencoder() if tiny else Autoencoder(SMALL_VAE)).eval()
        x = torch.empty(1, 3, 8 * size[0], 8 * size[1]) if encodes else torch.empty(1, 4, *size)
        return lambda: (tiled_vae.encode if encodes else tiled_vae.decode)(vae, x, tile)

    traced = traced_peak(build)
    config = TinyAutoencoder().config if tiny else SMALL_VAE
    if tile is None:
        run = activations.vae_encode if encodes else activations.vae_decode
        assert run(config, size, ENGINE, tiny) == pytest.approx(traced, rel=0.03)
    else:
        banded = activations.vae_banded(config, size, tile, ENGINE, tiny, encodes)
        assert 0.9 * traced < banded < 2 * traced


def test_text_encoders() -> None:
    config = replace(SD15.text[0], hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4)

    def build() -> Callable[[], object]:
        encoder = TextEncoder(config).eval()
        ids = torch.zeros(3, 77, dtype=torch.long)
        return lambda: encoder.encode(ids, 1, True)

    assert activations.text_encode(config, 3, ENGINE) == pytest.approx(traced_peak(build), rel=0.1)


def test_a_second_picture_costs_as_much_as_the_first() -> None:
    one, two = (activations.unet_step(SD15.unet, n, 2, (64, 64), 77, Engine(2, gpu=True)) for n in (1, 2))
    assert 1.8 * one < two <= 2 * one
