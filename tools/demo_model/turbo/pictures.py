"""What the teacher learns from: scenes of the larger world as latents, with all that it is told of them.

A caption leaves open where in its place an object stands: four numbers say that, and they are drawn with the noise, not
beside it (:func:`coupled`). Noise and picture may go together in any way that leaves each its distribution
(rectified flow, arXiv:2209.03003); so the steps at much noise have one answer to learn, not the mean of many, which
is what a teacher of some thousand steps has no time for, and what a student of one step would blur.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gguf_sd.demo.world_large import OFFSETS, SIZE, Sampler, render
from gguf_sd.models.vae import Autoencoder

SPREAD = 1 / 1.5  # deviation of an offset before it is kept within -1 ... 1
EDGE = SIZE // 8  # of a picture's latents
SHARD = 512  # pictures encoded at a time


@dataclass(frozen=True)
class Pictures:
    latents: Tensor  # [N, 4, 16, 16], as the autoencoder gives them
    time_ids: Tensor  # [N, 6]
    moves: Tensor  # [N, OFFSETS], of unit deviation; where the objects stand
    captions: list[str]


def patterns() -> Tensor:
    """Of the noise what says where objects stand: orthonormal, [OFFSETS, 4 EDGE EDGE]. Pattern i lies in channel i,
    half a wave along the rows or the columns in turn."""
    wave = torch.cos(torch.pi * (torch.arange(EDGE) + 0.5) / EDGE)
    found = torch.zeros(OFFSETS, 4, EDGE, EDGE)
    for i in range(OFFSETS):
        found[i, i] = wave[None, :] if i % 2 == 0 else wave[:, None]
    return torch.nn.functional.normalize(found.flatten(1))


def coupled(noise: Tensor, moves: Tensor) -> Tensor:
    """Noise [B, 4, EDGE, EDGE] whose part along the patterns is ``moves`` [B, OFFSETS]; all else stays. Where moves are
    normal the noise is as it was, normal in all."""
    basis = patterns()
    flat = noise.flatten(1)
    return (flat + (moves - flat @ basis.T) @ basis).view_as(noise)


@torch.no_grad()
def encode_shard(vae: Autoencoder, number: int, seed: int, count: int = SHARD) -> dict[str, object]:
    """``count`` pictures, other ones for each number, their latents [count, 4, 16, 16] in half precision."""
    sampler = Sampler(seed * 1_000_003 + number)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
    scenes, views = sampler.draw(count), [sampler.view() for _ in range(count)]
    moves = torch.randn(count, OFFSETS, generator=generator)
    offsets = (SPREAD * moves).clamp(-1, 1)
    latents = []
    for i in range(0, count, 16):
        part = slice(i, i + 16)
        latents.append(vae.encode(render(scenes[part], offsets[part], views[part]))[0])
    return {
        "latents": torch.cat(latents).half(),
        "time_ids": torch.tensor([view.time_ids for view in views]),
        "moves": moves,
        "captions": [scene.caption for scene in scenes],
    }


def joined(shards: list[dict[str, object]]) -> Pictures:
    """All shards' pictures."""
    tensors = {key: torch.cat([s[key] for s in shards]) for key in ("latents", "time_ids", "moves")}  # type: ignore[misc]
    captions = [caption for shard in shards for caption in shard["captions"]]  # type: ignore[attr-defined]
    return Pictures(tensors["latents"].float(), tensors["time_ids"].float(), tensors["moves"], captions)
