"""Cheap looks at a picture that is still being painted: through a small decoder, else by a linear map."""

from __future__ import annotations

from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor

from gguf_sd.config import SD15, SDXL, VAEConfig
from gguf_sd.errors import GgufSdError
from gguf_sd.models import tiled_vae
from gguf_sd.models.tiny_vae import TinyAutoencoder
from gguf_sd.models.vae import Autoencoder

# Red, green and blue (0 … 1) = latents times the first four rows, plus the last. Fitted by least squares to TAESD's
# latents of photographs by tools/fit_preview.py, which says how. R² is the share of the variance of the
# colours that it explains; photographs that the fit has not seen come out at 16 to 22 dB, at their latents' size.
LATENT_RGB: dict[str, tuple[tuple[float, float, float], ...]] = {
    "sd1": (  # R² 0.84
        (0.1800, 0.1268, 0.1298),
        (0.0834, 0.1433, 0.0717),
        (-0.0921, 0.0984, 0.1109),
        (-0.1175, -0.1585, -0.2600),
        (0.4915, 0.4309, 0.3892),
    ),
    "sdxl": (  # R² 0.85
        (0.1912, 0.2023, 0.2031),
        (-0.1190, 0.0111, 0.0368),
        (0.0582, 0.0547, -0.0115),
        (-0.1712, -0.1104, -0.0999),
        (0.5709, 0.4720, 0.4345),
    ),
}
FAMILIES = {"sd1": SD15.vae, "sdxl": SDXL.vae}


@torch.inference_mode()
def latent_to_rgb(latents: Tensor, name: str, size: tuple[int, int]) -> Image.Image:
    """Scaled latents [4, h, w] -> a blurred picture of ``size`` (width, height), mode RGB.

    ``name``: sd1 or sdxl, whose latents they are. Values that are not finite come out as some colour: a preview shows
    what there is. Raises GgufSdError for another name.
    """
    if name not in LATENT_RGB:
        raise GgufSdError(f"no linear preview for latents of {name!r}; choose from {', '.join(LATENT_RGB)}")
    *rows, constant = torch.tensor(LATENT_RGB[name])
    flat = latents.float().cpu().permute(1, 2, 0) @ torch.stack(rows) + constant
    return _image(flat).resize(size, Image.Resampling.BICUBIC)


def family(vae: VAEConfig) -> str | None:
    """Which linear map fits a model's latents; None for a VAE of another kind, whose latents mean something else."""
    plain = replace(vae, overflows_float16=False)
    return next((name for name, known in FAMILIES.items() if plain == replace(known, overflows_float16=False)), None)


@torch.inference_mode()
def previews(
    denoised: Tensor, vae: VAEConfig, decoder: Autoencoder | TinyAutoencoder | None = None, tile: int | None = None
) -> list[Image.Image]:
    """Pictures [8h x 8w] of a step's estimate [B, 4, h, w] of the finished latents.

    ``vae`` is the model's. ``decoder`` paints them where there is a cheap one (TAESD, or the model's own where that is
    small), in tiles of ``tile``, see :mod:`gguf_sd.models.tiled_vae`; without, the linear map does.
    Raises GgufSdError for a VAE that neither can show.
    """
    if decoder is not None:
        first = next(decoder.parameters())
        decoded = [tiled_vae.decode(decoder, latents[None].to(first), tile)[0] for latents in denoised]
        return [_image(pixels.float().cpu().permute(1, 2, 0) / 2 + 0.5) for pixels in decoded]
    if (name := family(vae)) is None:
        raise GgufSdError("this model's VAE is of its own kind, there is no linear preview for it; give a decoder")
    size = denoised.shape[3] * vae.downscale, denoised.shape[2] * vae.downscale
    return [latent_to_rgb(latents, name, size) for latents in denoised]


def _image(pixels: Tensor) -> Image.Image:
    """[H, W, 3] in 0 … 1 -> mode RGB."""
    return Image.fromarray((pixels.nan_to_num(0.5).clamp(0, 1) * 255).round().to(torch.uint8).numpy())
