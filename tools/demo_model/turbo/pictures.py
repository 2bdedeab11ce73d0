"""What the UNet learns from: scenes of the larger world as latents, with all that decides what they look like."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gguf_sd.demo.world_large import OFFSETS, Sampler, render
from gguf_sd.models.vae import Autoencoder

REACH = 1.5  # deviations of a channel's mean that move an object as far as it goes
SHARD = 512  # pictures encoded at a time


@dataclass(frozen=True)
class Pictures:
    """``means`` decide the scene's offsets: noise whose channels have these means, in deviations, stands for it."""

    latents: Tensor  # [N, 4, 16, 16], as the autoencoder gives them
    means: Tensor  # [N, OFFSETS]
    time_ids: Tensor  # [N, 6]
    captions: list[str]


def offsets(means: Tensor) -> Tensor:
    """Means of noise's channels, in deviations, to the offsets of the scene that the noise is to become."""
    return (means / REACH).clamp(-1, 1)


def channel_means(noise: Tensor) -> Tensor:
    """Noise [B, 4, h, w] -> the mean of each channel over its deviation, [B, 4]."""
    return noise.mean((2, 3)) * (noise.shape[2] * noise.shape[3]) ** 0.5


def noise_for(means: Tensor, noise: Tensor) -> Tensor:
    """The noise [B, 4, h, w] moved so that :func:`channel_means` gives ``means`` [B, 4]."""
    pixels = noise.shape[2] * noise.shape[3]
    return noise + ((means - channel_means(noise)) / pixels**0.5)[:, :, None, None]


@torch.no_grad()
def encode_shard(vae: Autoencoder, number: int, seed: int, count: int = SHARD) -> dict[str, object]:
    """``count`` pictures, other ones for each number, their latents [count, 4, 16, 16] in half precision."""
    sampler = Sampler(seed * 1_000_003 + number)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
    scenes, views = sampler.draw(count), [sampler.view() for _ in range(count)]
    means = torch.randn(count, OFFSETS, generator=generator)
    moves = offsets(means)
    latents = []
    for i in range(0, count, 16):
        part = slice(i, i + 16)
        latents.append(vae.encode(render(scenes[part], moves[part], views[part]))[0])
    return {
        "latents": torch.cat(latents).half(),
        "means": means,
        "time_ids": torch.tensor([view.time_ids for view in views]),
        "captions": [scene.caption for scene in scenes],
    }


def joined(shards: list[dict[str, object]]) -> Pictures:
    """All shards' pictures."""
    tensors = {key: torch.cat([s[key] for s in shards]) for key in ("latents", "means", "time_ids")}  # type: ignore[misc]
    captions = [caption for shard in shards for caption in shard["captions"]]  # type: ignore[attr-defined]
    return Pictures(tensors["latents"].float(), tensors["means"], tensors["time_ids"].float(), captions)
