"""TAESD and TAESDXL are told apart by what they make of latents."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gguf_sd.checkpoint.tiny_family import tiny_family
from gguf_sd.checkpoint.vae_file import VAEFile
from gguf_sd.config import SD15, SDXL
from gguf_sd.errors import GgufSdError
from gguf_sd.models.tiny_vae import TinyAutoencoder

TAESD = Path(__file__).resolve().parents[3] / "shared" / "data" / "taesd"


@pytest.mark.skipif(not TAESD.is_dir(), reason="the trained TAESD is not here")
def test_the_other_family_is_refused() -> None:
    small, large = TAESD / "taesd_decoder.safetensors", TAESD / "taesdxl_decoder.safetensors"
    assert VAEFile.open(small, SD15.vae)
    assert VAEFile.open(large, SDXL.vae)
    with pytest.raises(GgufSdError, match=r"taesdxl_decoder.* is made for SDXL, .* choose TAESD$"):
        VAEFile.open(large, SD15.vae)
    with pytest.raises(GgufSdError, match=r"taesd_decoder.* is made for Stable Diffusion 1.x, .* choose TAESDXL$"):
        VAEFile.open(small, SDXL.vae)


def test_an_unknown_decoder_is_of_no_family() -> None:
    torch.manual_seed(0)
    assert tiny_family(TinyAutoencoder(encodes=False).eval()) is None
