"""The UNet of the turbo demo model, and what both its trainings take: the teacher's and the student's.

It predicts velocities (arXiv:2202.00512), where SDXL-Turbo predicts noise. The one step from timestep 999 gives
latents (noisy - 0.998 noise) / 0.068: an error in predicted noise counts there 14.6-fold, more than a UNet of 6 M
parameters, or weights of 4 bits, can be as exact about. An error in predicted velocity counts as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from tools.demo_model.turbo.pictures import Pictures
from tools.demo_model.turbo.text import POOLED
from tools.demo_model.turbo.vae import SCALING

WIDTHS, DEPTHS, CONTEXT, SIZE_WIDTH = (64, 96, 128), (0, 1, 1), 256, 256


def unet_config() -> dict[str, Any]:
    """In diffusers' words. Levels, attention, conditioning and projections are SDXL's, narrower."""
    return {
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": WIDTHS,
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": tuple(max(depth, 1) for depth in DEPTHS),
        "attention_head_dim": tuple(width // 32 for width in WIDTHS),  # diffusers' name for the number of heads
        "cross_attention_dim": CONTEXT,
        "norm_num_groups": 16,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": SIZE_WIDTH,
        "projection_class_embeddings_input_dim": POOLED + 6 * SIZE_WIDTH,
    }


def new_unet() -> nn.Module:
    """With random weights. Its attention is written out: on a processor the backward pass of torch's fused one took
    more than a third of a training step."""
    unet = UNet2DConditionModel(**unet_config())
    unet.set_attn_processor(AttnProcessor())
    return unet


@dataclass(frozen=True)
class Told:
    """What the UNet is told of pictures."""

    context: Tensor  # [B, LENGTH, CONTEXT]
    pooled: Tensor  # [B, POOLED]
    time_ids: Tensor  # [B, 6]

    def but(self, silent: Tensor) -> Told:
        """Nothing of their captions where ``silent`` [B] is true: zeros, as SDXL has it."""
        told = (~silent).float()
        return Told(self.context * told[:, None, None], self.pooled * told[:, None], self.time_ids)

    def twice(self, silent: Tensor) -> Told:
        """All of it two times over; nothing of the captions where ``silent`` [2 B] is true."""
        return Told(*(value.repeat(2, *[1] * (value.ndim - 1)) for value in vars(self).values())).but(silent)


@dataclass(frozen=True)
class Lessons:
    """Everything the teacher trains on; each caption is encoded once."""

    latents: Tensor  # [N, 4, 16, 16], scaled
    time_ids: Tensor  # [N, 6]
    moves: Tensor  # [N, OFFSETS]
    caption: Tensor  # [N] rows of contexts and pooled
    contexts: Tensor  # [M, LENGTH, CONTEXT]
    pooled: Tensor  # [M, POOLED]

    def told(self, rows: Tensor) -> Told:
        return Told(self.contexts[self.caption[rows]], self.pooled[self.caption[rows]], self.time_ids[rows])


def lessons(pictures: Pictures, encode: Callable[[list[str]], tuple[Tensor, Tensor]]) -> Lessons:
    told = sorted(set(pictures.captions))
    row = {caption: i for i, caption in enumerate(told)}
    rows = torch.tensor([row[caption] for caption in pictures.captions])
    return Lessons(pictures.latents * SCALING, pictures.time_ids, pictures.moves, rows, *encode(told))


def predict(unet: nn.Module, noisy: Tensor, t: Tensor, told: Told) -> Tensor:
    """The velocity [B, 4, h, w] of ``noisy`` at timesteps [B], sqrt(a) noise - sqrt(1 - a) latents."""
    added = {"text_embeds": told.pooled, "time_ids": told.time_ids}
    velocity: Tensor = unet(noisy, t, told.context, added_cond_kwargs=added).sample
    return velocity
