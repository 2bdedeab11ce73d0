"""Encoded prompts, and the UNet under classifier-free guidance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gguf_sd.models.unet import UNet


class Prompt(NamedTuple):
    """An encoded prompt: what the UNet attends to [1, N, context_dim], and SDXL's vector of pooled text and sizes
    [1, vector_dim]."""

    context: Tensor
    vector: Tensor | None = None


@dataclass(frozen=True)
class Conditioning:
    """The encoded prompt and, for guidance, the negative prompt."""

    positive: Prompt
    negative: Prompt | None


class Predictor:
    """The UNet under classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598)."""

    def __init__(self, unet: UNet, conditioning: Conditioning, guidance: float, batched: bool, extra: Tensor | None):
        self.unet, self.conditioning, self.guidance, self.batched = unet, conditioning, guidance, batched
        self.extra = extra  # channels of an inpainting checkpoint, [B, 5, h, w]

    @torch.inference_mode()
    def __call__(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """latents [B, 4, h, w], 0-dim timestep -> prediction [B, 4, h, w]."""
        positive, negative = self.conditioning.positive, self.conditioning.negative
        if negative is None:
            return self._run(latents, timestep, [positive])
        if self.batched:
            without, with_prompt = self._run(latents, timestep, [negative, positive]).chunk(2)
        else:
            without = self._run(latents, timestep, [negative])
            with_prompt = self._run(latents, timestep, [positive])
        return without + self.guidance * (with_prompt - without)

    def _run(self, latents: Tensor, timestep: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """The predictions for each prompt in turn, [prompts * B, 4, h, w]."""
        batch = len(latents)
        context = torch.cat([prompt.context.expand(batch, -1, -1) for prompt in prompts])
        vectors = [prompt.vector.expand(batch, -1) for prompt in prompts if prompt.vector is not None]
        whole = latents if self.extra is None else torch.cat([latents, self.extra], dim=1)
        repeated = whole.repeat(len(prompts), 1, 1, 1)
        return self.unet(repeated, timestep.expand(len(repeated)), context, torch.cat(vectors) if vectors else None)
