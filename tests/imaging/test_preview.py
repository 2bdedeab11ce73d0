"""Previews: the linear map, the small decoder, and which of them serves a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

from gguf_sd.checkpoint.vae_file import load_vae_file
from gguf_sd.config import SD15, SDXL, SDXL_TURBO, VAEConfig
from gguf_sd.errors import GgufSdError
from gguf_sd.imaging.images import resized, to_tensor
from gguf_sd.imaging.preview import LATENT_RGB, family, latent_to_rgb, previews
from gguf_sd.models.tiny_vae import TinyAutoencoder
from gguf_sd.quality import psnr

TAESD = Path(__file__).resolve().parents[3] / "shared" / "data" / "taesd"


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_linear_map_by_hand(name: str) -> None:
    """One latent a corner, each its own; upright, not mirrored, at its size."""
    channels = torch.tensor([[0.5, -0.5, 0.25, 1.0], [-1.0, 0.5, 0.0, -0.5]])  # left, right
    latents = torch.stack([channels.T, -channels.T], dim=1)  # [4, 2, 2]: the lower row is the upper one negated
    assert latents[:, 0, 1].tolist() == channels[1].tolist()
    table = LATENT_RGB[name]
    got = np.asarray(latent_to_rgb(latents, name, (2, 2)))
    for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
        latent = latents[:, row, column].tolist()
        for colour in range(3):
            value = table[4][colour] + sum(latent[i] * table[i][colour] for i in range(4))
            assert abs(float(got[row, column, colour]) - min(max(value, 0), 1) * 255) <= 0.51
    assert latent_to_rgb(latents.half(), name, (48, 16)).size == (48, 16)


@pytest.mark.skipif(not TAESD.is_dir(), reason="the trained TAESD is not here")
@pytest.mark.parametrize("name", ["sd1", "sdxl"])
@pytest.mark.parametrize(("photograph", "bound"), [("astronaut", 18.5), ("coffee", 18.5), ("rocket", 21.0)])
@torch.inference_mode()
def test_linear_map_looks_like_the_photograph(name: str, photograph: str, bound: float) -> None:
    """Against the photograph at the latents' size, where a picture of its mean colour has 11 to 19 dB."""
    picture = resized(Image.fromarray(getattr(skimage.data, photograph)()), 256, 256, "crop")
    vae = load_vae_file(
        TAESD / {"sd1": "taesd_decoder.safetensors", "sdxl": "taesdxl_decoder.safetensors"}[name], torch.float32
    )
    latents, _ = vae.encode(to_tensor(picture))
    small = picture.resize((32, 32), Image.Resampling.BOX)
    assert psnr(latent_to_rgb(latents[0], name, (32, 32)), small) >= bound
    config = {"sd1": SD15, "sdxl": SDXL}[name].vae
    [shown] = previews(latents, config)
    assert shown.size == picture.size
    if photograph == "astronaut":
        [decoded] = previews(latents, config, vae)
        assert psnr(decoded, picture) > psnr(shown, picture) + 2, "the decoder shows no more than the linear map"
    other = latent_to_rgb(latents[0], {"sd1": "sdxl", "sdxl": "sd1"}[name], (32, 32))
    assert psnr(other, small) < bound - 2, "either map would do: the bound is too low"


def test_a_decoder_is_used_where_there_is_one() -> None:
    torch.manual_seed(5)
    vae = TinyAutoencoder(encodes=False).eval().to(torch.bfloat16)
    denoised = torch.randn(2, 4, 4, 6)
    got = previews(denoised, VAEConfig(scaling_factor=1.0), vae)
    assert [picture.size for picture in got] == [(48, 32)] * 2
    with torch.inference_mode():
        decoded = vae.decode(denoised.to(torch.bfloat16))[1].float()
    expected = ((decoded / 2 + 0.5).clamp(0, 1) * 255).permute(1, 2, 0).numpy()
    assert np.abs(np.asarray(got[1], np.float32) - expected).max() <= 1.1
    assert np.ptp(expected) > 1, "a flat picture proves nothing"


def test_values_that_are_not_finite_are_shown() -> None:
    latents = torch.full((1, 4, 2, 2), torch.nan)
    latents[0, :, 0, 0] = torch.tensor([torch.inf, 0.0, 0.0, 0.0])
    [picture] = previews(latents, SD15.vae)
    assert picture.size == (16, 16)
    small = np.asarray(latent_to_rgb(latents[0], "sd1", (2, 2)))
    assert small[1, 1].tolist() == [128] * 3, "what is no number is grey"
    assert np.ptp(small[..., 0]) > 0


def test_maps_belong_to_families() -> None:
    assert [family(c.vae) for c in (SD15, SDXL, SDXL_TURBO)] == ["sd1", "sdxl", "sdxl"]
    assert family(replace(SDXL.vae, overflows_float16=False)) == "sdxl"
    own = replace(SD15.vae, block_out_channels=(32, 32, 64, 96))
    assert family(own) is None
    with pytest.raises(GgufSdError, match="no linear preview for it; give a decoder"):
        previews(torch.zeros(1, 4, 2, 2), own)
    with pytest.raises(GgufSdError, match="no linear preview for latents of 'flux'; choose from sd1, sdxl"):
        latent_to_rgb(torch.zeros(4, 2, 2), "flux", (16, 16))
