"""What the student learns from: where the teacher, guided, gets to from a given noise.

The teacher is run with a deterministic solver, so that each noise and caption have one answer, which one step can
learn. As captions are drawn anew, the student hears of more scenes than the teacher saw pictures of.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gguf_sd.demo.check_large import judge
from gguf_sd.demo.world_large import Sampler, View
from gguf_sd.models.vae import Autoencoder
from tools.demo_model.turbo.paint import SHAPE, Sampling, denoise
from tools.demo_model.turbo.text import TextEncoders
from tools.demo_model.turbo.unet import Told

SHARD, BATCH = 512, 64
SOLVER = Sampling("dpmpp_2m", 10, 1.5)


@dataclass(frozen=True)
class Trajectories:
    """Both ends of each, and what the teacher was told."""

    noise: Tensor  # [N, 4, 16, 16]
    latents: Tensor  # [N, 4, 16, 16], scaled
    contexts: Tensor  # [N, LENGTH, CONTEXT]
    pooled: Tensor  # [N, POOLED]
    time_ids: Tensor  # [N, 6]

    def told(self, rows: Tensor) -> Told:
        return Told(self.contexts[rows], self.pooled[rows], self.time_ids[rows])


@torch.no_grad()
def trace_shard(
    teacher: nn.Module,
    vae: Autoencoder,
    text: TextEncoders,
    number: int,
    seed: int,
    count: int = SHARD,
    bf16: bool = False,
) -> dict[str, Tensor]:
    """``count`` trajectories, other ones for each number, but for those that end in a wrong picture: these are left
    out. Pictures enlarged or cut are not checked. ``bf16``: the teacher's products are made in it."""
    sampler = Sampler(seed * 1_000_003 + 500_000 + number)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + 500_000 + number)
    parts: list[list[Tensor]] = []
    for start in range(0, count, BATCH):
        size = min(BATCH, count - start)
        scenes, views = sampler.draw(size), [sampler.view() for _ in range(size)]
        told = Told(
            *text.encode([scene.caption for scene in scenes]), torch.tensor([view.time_ids for view in views]).float()
        )
        noise = torch.randn(size, *SHAPE, generator=generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            latents = denoise(teacher, told, noise, SOLVER)
        good = [
            view != View() or judge(vae.decode(latents[i : i + 1])[0], scene).all
            for i, (scene, view) in enumerate(zip(scenes, views, strict=True))
        ]
        kept = torch.tensor(good)
        parts.append([value[kept] for value in (noise, latents, told.context, told.pooled, told.time_ids)])
    columns = ("noise", "latents", "contexts", "pooled", "time_ids")
    return {name: torch.cat(column) for name, column in zip(columns, zip(*parts, strict=True), strict=True)}


def joined(shards: list[dict[str, Tensor]]) -> Trajectories:
    return Trajectories(**{name: torch.cat([shard[name] for shard in shards]) for name in shards[0]})
