"""What the teacher learns from: scenes of the larger world as latents, with all that it is told of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gguf_sd.demo.world_large import OFFSETS, Sampler, render
from gguf_sd.models.vae import Autoencoder

SPREAD = 1 / 1.5  # deviation of an offset before it is kept within -1 ... 1
SHARD = 512  # pictures encoded at a time


@dataclass(frozen=True)
class Pictures:
    latents: Tensor  # [N, 4, 16, 16], as the autoencoder gives them
    time_ids: Tensor  # [N, 6]
    captions: list[str]


@torch.no_grad()
def encode_shard(vae: Autoencoder, number: int, seed: int, count: int = SHARD) -> dict[str, object]:
    """``count`` pictures, other ones for each number, their latents [count, 4, 16, 16] in half precision."""
    sampler = Sampler(seed * 1_000_003 + number)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
    scenes, views = sampler.draw(count), [sampler.view() for _ in range(count)]
    offsets = (SPREAD * torch.randn(count, OFFSETS, generator=generator)).clamp(-1, 1)
    latents = []
    for i in range(0, count, 16):
        part = slice(i, i + 16)
        latents.append(vae.encode(render(scenes[part], offsets[part], views[part]))[0])
    return {
        "latents": torch.cat(latents).half(),
        "time_ids": torch.tensor([view.time_ids for view in views]),
        "captions": [scene.caption for scene in scenes],
    }


def joined(shards: list[dict[str, object]]) -> Pictures:
    """All shards' pictures."""
    tensors = {key: torch.cat([s[key] for s in shards]) for key in ("latents", "time_ids")}  # type: ignore[misc]
    captions = [caption for shard in shards for caption in shard["captions"]]  # type: ignore[attr-defined]
    return Pictures(tensors["latents"].float(), tensors["time_ids"].float(), captions)
