"""Cheap looks at latents while they are being painted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from gguf_sd.config import SD15, SDXL, VAEConfig
from gguf_sd.errors import GgufSdError
from gguf_sd.models.tiny_vae import TinyAutoencoder
from gguf_sd.models.vae import Autoencoder

Rows = tuple[tuple[float, float, float], ...]
LATENT_RGB: dict[str, Rows] = {}
