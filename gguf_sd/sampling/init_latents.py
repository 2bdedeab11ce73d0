"""Where sampling begins: pure noise, a noised picture (image-to-image), or a picture with a hole (inpainting).

Noise is drawn in the order in which diffusers' pipelines draw it, so that the same seed gives the same picture.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from gguf_sd.config import ModelConfig
from gguf_sd.imaging.images import to_tensor
from gguf_sd.imaging.masks import latent_mask, mask_tensor
from gguf_sd.models import tiled_vae
from gguf_sd.models.tiny_vae import TinyAutoencoder
from gguf_sd.models.vae import Autoencoder
from gguf_sd.sampling import NoiseSource, Schedule, add_noise
from gguf_sd.sampling.samplers import Blend


@dataclass(frozen=True)
class InitLatents:
    """What the sampler starts from, for a batch of B pictures."""

    latents: Tensor  # [B, 4, h, w]: unit-variance noise, or noised for start_step
    start_step: int | None = None  # None = from pure noise
    extra: Tensor | None = None  # [B, 5, h, w], of inpainting checkpoints: mask and masked picture, beside the latents
    blend: Blend | None = None  # puts the unmasked part of the picture back after every step


class Encoder:
    """Pictures to scaled latents, one at a time, sampled as the autoencoder's distribution says."""

    def __init__(
        self, vae: Autoencoder | TinyAutoencoder, device: torch.device, dtype: torch.dtype, tile: int | None = None
    ):
        self.vae, self.device, self.dtype, self.tile = vae, device, dtype, tile

    @torch.inference_mode()
    def __call__(self, picture: Tensor, noise: Tensor) -> Tensor:
        """picture [1, 3, H, W] in -1 … 1, noise [B, 4, h, w] -> latents [B, 4, h, w]."""
        image = picture.to(self.device, next(self.vae.parameters()).dtype)
        mean, std = tiled_vae.encode(self.vae, image, self.tile)
        return ((mean + std * noise.to(mean)) * self.vae.config.scaling_factor).to(self.dtype)


@dataclass(frozen=True)
class InitImage:
    """The picture to start from and, for inpainting, the mask (mode L, white = repaint), at the size to paint."""

    image: Image.Image
    mask: Image.Image | None
    start_step: int
    from_noise: bool  # strength 1 with a mask: nothing of what is under it shows through


def text_only(config: ModelConfig, shape: tuple[int, ...], noise: NoiseSource, encoder: Encoder | None) -> InitLatents:
    """Pure noise. An inpainting checkpoint is told that everything is masked; only there ``encoder`` is needed."""
    latents = noise(shape)
    if encoder is None:
        return InitLatents(latents)
    return InitLatents(latents, extra=_all_masked(config, latents, encoder))


def from_picture(
    config: ModelConfig, shape: tuple[int, ...], noise: NoiseSource, encoder: Encoder, picture: InitImage, run: Schedule
) -> InitLatents:
    """Image-to-image without a mask, inpainting with one; ``shape`` is the latents' [B, 4, h, w]."""
    pixels = to_tensor(picture.image)
    inpaints = config.unet.in_channels > config.vae.latent_channels
    if picture.mask is None:
        clean = encoder(pixels, noise(shape))
        latents = add_noise(clean, noise(shape), run, picture.start_step)
        extra = _all_masked(config, latents, encoder) if inpaints else None
        return InitLatents(latents, picture.start_step, extra)

    # Only where nothing of the picture is needed beside its masked self is it not encoded.
    whole = None if inpaints and picture.from_noise else encoder(pixels, noise(shape))
    eps = noise(shape)
    start = picture.start_step if whole is not None and not picture.from_noise else None
    latents = eps if whole is None or start is None else add_noise(whole, eps, run, start)
    hole = mask_tensor(picture.mask)
    mask = latent_mask(hole, (shape[2], shape[3])).to(eps)
    masked_noise = noise(shape)  # diffusers draws it for every inpainting, whether or not the UNet takes the result
    if whole is None or inpaints:
        masked = encoder(pixels * (1 - hole), masked_noise)
        return InitLatents(latents, start, torch.cat([mask.expand(shape[0], -1, -1, -1), masked], dim=1))
    return InitLatents(latents, start, blend=_Keep(whole, eps, mask, run))


def _all_masked(config: ModelConfig, latents: Tensor, encoder: Encoder) -> Tensor:
    factor = config.vae.downscale
    height, width = latents.shape[2] * factor, latents.shape[3] * factor
    grey = encoder(torch.zeros(1, config.vae.in_channels, height, width), torch.zeros_like(latents))
    return torch.cat([torch.ones_like(latents[:, :1]), grey], dim=1)


@dataclass(frozen=True)
class _Keep:
    """Outside the mask, latents are those of the picture, noised for the coming step."""

    clean: Tensor
    eps: Tensor
    mask: Tensor
    run: Schedule

    def __call__(self, x: Tensor, step: int) -> Tensor:
        kept = self.clean if step >= self.run.steps else add_noise(self.clean, self.eps, self.run, step)
        return torch.where(self.mask > 0, x, kept.to(x))
