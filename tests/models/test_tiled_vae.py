"""Autoencoders in bands of rows, against themselves whole, and against diffusers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from benchmarks.lib.trace_memory import traced_peak
from gguf_sd.checkpoint.vae_file import VAEFile
from gguf_sd.config import VAEConfig
from gguf_sd.demo import model_folder
from gguf_sd.errors import GgufSdError
from gguf_sd.models import tiled_vae
from gguf_sd.models.int8 import use_int8_decoder
from gguf_sd.models.kl_bands import Limits, Store
from gguf_sd.models.tiny_vae import TinyAutoencoder
from gguf_sd.models.vae import Autoencoder
from gguf_sd.runtime.activations import Engine, vae_banded
from gguf_sd_kernels.cpu import int8

TAESD = Path(__file__).resolve().parents[3] / "shared" / "data" / "taesd"
TILES = (1, 3, 6, 13)
SIZE = (18, 15)  # latents: height and width, which no tile divides
SMALL = VAEConfig(block_out_channels=(16, 32, 32), layers_per_block=1, norm_groups=8, scaling_factor=0.5)


def picture(height: int, width: int) -> Tensor:
    """[1, 3, H, W]: a disc and a corner of fine stripes on a slope: a seam would show on flat and on busy ground."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    disc = ((x - 0.2) ** 2 + y**2 < 0.3).float()
    stripes = 0.2 * torch.sin(25 * x) * (y > 0.7)
    ground = torch.stack([0.2 * x + 0.3 + stripes, 0.2 * y + 0.4 + stripes, 0.1 * x * y + 0.5 + stripes])
    return torch.where(disc > 0, torch.tensor([0.6, -0.5, -0.6])[:, None, None], ground)[None]


def psnr(got: Tensor, expected: Tensor) -> float:
    """Decibels, of a signal as wide as what is expected."""
    span = (expected.max() - expected.min()).item()
    return 10 * torch.log10(span**2 / (got - expected).square().mean()).item()


def seam(got: Tensor, whole: Tensor) -> float:
    """The most that gradients from one row to the next grow at any row, and those from column to column."""
    ratios = [
        (got.diff(dim=dim).square().mean((0, 1, 5 - dim)) / whole.diff(dim=dim).square().mean((0, 1, 5 - dim))).max()
        for dim in (2, 3)
    ]
    return max(ratio.item() for ratio in ratios)


def randomised(vae: torch.nn.Module, seed: int = 3) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
            else:
                parameter.copy_(0.2 * noise + (1.0 if name.endswith("weight") else 0.0))
    return vae.eval()


@pytest.fixture(scope="module", params=["demo", "taesd"])
def trained(request: pytest.FixtureRequest) -> Autoencoder | TinyAutoencoder:
    if request.param == "taesd" and not TAESD.is_dir():
        pytest.skip("TAESD is not here")
    return VAEFile.open(TAESD / "taesd_decoder.safetensors" if request.param == "taesd" else model_folder()).load(
        torch.float32
    )


@pytest.mark.parametrize("tile", TILES)
@torch.inference_mode()
def test_trained_weights_show_no_seam(trained: Autoencoder | TinyAutoencoder, tile: int) -> None:
    image = picture(8 * SIZE[0], 8 * SIZE[1])
    mean, _ = trained.encode(image)
    latents = mean * trained.config.scaling_factor
    whole, got = trained.decode(latents), tiled_vae.decode(trained, latents, tile)
    assert whole.std() > 0.1, "a picture of nothing: the comparison is blind"
    assert psnr(got, whole) > 80
    assert seam(got, whole) < 1.005
    encoded, deviation = tiled_vae.encode(trained, image, tile)
    assert psnr(encoded, mean) > 80
    assert deviation.shape == mean.shape


@pytest.mark.parametrize("size", [(7, 10), (1, 5)])
@torch.inference_mode()
def test_batches_and_odd_sizes(size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(4)
    latents = torch.randn(2, 4, *size, generator=generator)
    for vae in (randomised(Autoencoder(SMALL)), randomised(TinyAutoencoder())):
        scale = vae.config.downscale
        images = torch.rand(2, 3, scale * size[0], scale * size[1], generator=generator)
        whole, (mean, std) = vae.decode(latents), vae.encode(images)
        for tile in (1, 3):
            assert psnr(tiled_vae.decode(vae, latents, tile), whole) > 80
            got = tiled_vae.encode(vae, images, tile)
            assert psnr(got[0], mean) > 80
            torch.testing.assert_close(got[1], std, rtol=1e-4, atol=1e-6)


def test_every_way_to_store_is_taken() -> None:
    """The tiles above would else prove less than they seem to."""
    config, finest = VAEConfig(), 128 * 64 * SIZE[0] * SIZE[1]
    limits = [limit for tile in TILES if (limit := Limits.of(config, tile, *SIZE)) is not None]
    assert [limit.level(finest, True)[0] for limit in limits] == [Store.NOTHING, Store.ONE, Store.TWO, Store.TWO]
    assert [limit.level(finest // 2, False)[0] for limit in limits] == [Store.ONE, Store.TWO, Store.TWO, Store.TWO]


@torch.inference_mode()
def test_a_tile_that_holds_the_picture_is_the_whole() -> None:
    vae = randomised(Autoencoder(SMALL))
    latents = torch.randn(1, 4, 6, 9, generator=torch.Generator().manual_seed(5))
    for tile in (None, 9, 4096):
        assert torch.equal(tiled_vae.decode(vae, latents, tile), vae.decode(latents))
    with pytest.raises(GgufSdError, match=r"a VAE tile of 0 .* an edge of 1 latent pixel or more"):
        tiled_vae.decode(vae, latents, 0)


@torch.inference_mode()
def test_equals_diffusers_whole(tiny_pipeline: Callable[..., Path]) -> None:
    folder = tiny_pipeline() / "vae"
    oracle, vae = diffusers.AutoencoderKL.from_pretrained(folder), VAEFile.open(folder).load(torch.float32)
    image = picture(72, 56)
    expected = oracle.encode(image).latent_dist
    got = tiled_vae.encode(vae, image, 3)
    torch.testing.assert_close(got[0], expected.mean, rtol=0, atol=1e-4 * expected.mean.abs().max().item())
    torch.testing.assert_close(got[1], expected.std, rtol=1e-3, atol=1e-6)
    decoded = oracle.decode(expected.mean).sample
    ours = tiled_vae.decode(vae, expected.mean * vae.config.scaling_factor, 3)
    torch.testing.assert_close(ours, decoded, rtol=0, atol=1e-4 * decoded.abs().max().item())


@torch.inference_mode()
def test_sixteen_bits_are_as_exact_as_whole() -> None:
    """Statistics and sums of taps are taken in float32: in bands the rounding is no worse."""
    exact, latents = (
        randomised(Autoencoder(SMALL)),
        torch.randn(1, 4, 11, 14, generator=torch.Generator().manual_seed(6)),
    )
    expected = exact.decode(latents)
    vae = exact.to(torch.bfloat16)
    whole = psnr(vae.decode(latents.bfloat16()).float(), expected)
    assert psnr(tiled_vae.decode(vae, latents.bfloat16(), 3).float(), expected) > whole - 1.5


@torch.inference_mode()
def test_channels_far_from_zero_keep_their_statistics() -> None:
    """E[x²] - E[x]² in float32 would lose a variance that is a ten-thousandth of the square of the mean."""
    vae = randomised(Autoencoder(SMALL))
    vae.decoder.conv_in.bias.add_(300.0)
    latents = torch.randn(1, 4, 12, 12, generator=torch.Generator().manual_seed(7))
    expected = vae.double().decode(latents.double())
    got = tiled_vae.decode(vae.float(), latents, 4)
    assert psnr(got.double(), expected) > 80


@pytest.mark.parametrize("tile", [pytest.param(16, marks=pytest.mark.slow), 8])
def test_peak_memory_is_what_the_plan_counts_on(tile: int) -> None:
    config = VAEConfig(block_out_channels=(32, 64, 64), layers_per_block=1)
    edge = 4 * tile  # the first of which one map of the finest level is kept, not two

    def build() -> Callable[[], object]:
        vae, latents = Autoencoder(config).requires_grad_(False), torch.randn(1, 4, edge, edge)
        return lambda: tiled_vae.decode(vae, latents, tile)

    map_bytes = 4 * 32 * (4 * edge) ** 2
    peak = traced_peak(build)
    assert peak < 1.7 * map_bytes, "more than the finest map and the bands on their way"
    assert peak < 1.1 * vae_banded(config, (edge, edge), tile, Engine(4))


def test_other_weights_than_plain_are_refused() -> None:
    """Bands read weights themselves: what holds them otherwise must not be passed by."""
    latents = torch.randn(1, SMALL.latent_channels, 16, 16)
    if int8.has_operators():
        vae = Autoencoder(SMALL).eval()
        use_int8_decoder(vae, torch.float32)
        with pytest.raises(TypeError, match="take convolutions with plain weights, got Int8Conv2d"):
            tiled_vae.decode(vae, latents, 8)
    with torch.device("meta"):
        empty = Autoencoder(SMALL)
    with pytest.raises(TypeError, match="got Conv2d"):
        tiled_vae.decode(empty, latents, 8)
