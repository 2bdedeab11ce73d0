"""TAESD or TAESDXL: their files have the same tensors, but their decoders see other colours in the same latents."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from gguf_sd.imaging.preview import LATENT_RGB
from gguf_sd.models.tiny_vae import TinyAutoencoder

# Correlation of the decoded colours with each family's linear map. The published decoders reach 0.91 and 0.90 with
# their own and 0.61 with the other's; one with random weights stays below 0.3 with both.
CERTAIN, AHEAD = 0.75, 0.12


@torch.inference_mode()
def tiny_family(vae: TinyAutoencoder) -> str | None:
    """sd1 or sdxl, whose latents a float32 decoder was trained for; None where neither stands out."""
    latents = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    latents = F.interpolate(latents, scale_factor=2.0)
    colours = F.avg_pool2d(vae.decode(latents).float(), vae.config.downscale)
    found = {name: _correlation(colours, _linear(latents, name)) for name in LATENT_RGB}
    best, second = sorted(found, key=found.__getitem__, reverse=True)[:2]
    return best if found[best] >= CERTAIN and found[best] - found[second] >= AHEAD else None


def _linear(latents: Tensor, name: str) -> Tensor:
    """[B, 4, h, w] -> [B, 3, h, w], without the constant."""
    return torch.einsum("bchw,cr->brhw", latents, torch.tensor(LATENT_RGB[name][:-1]))


def _correlation(a: Tensor, b: Tensor) -> float:
    a, b = (x - x.mean((0, 2, 3), keepdim=True) for x in (a, b))
    return float((a * b).sum() / (a.norm() * b.norm()).clamp_min(1e-12))
