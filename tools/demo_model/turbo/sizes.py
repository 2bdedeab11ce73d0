"""Fifth stage: the decoder and the student learn what enlarged pictures look like.

The autoencoder of the second stage sees few of them, and with noise in its latents it learns to paint every edge
sharp; what the UNet is told of a picture's original size then cannot show. Its encoder does carry it: three of its
channels are means of 8x8 pixels, and where a picture was enlarged from 16x16 two cells in a row lie between two
colours, not one. So the decoder alone goes on learning, a third of its pictures enlarged, and no latent that was made
before changes its meaning. Then the student learns from its own pictures: of an enlarged one what it paints from the
same noise for one that is not, made small and enlarged again. A tenth of each weight stays as it was before (as in
"model soups", arXiv:2203.05482), which keeps what four steps had. To teach only the layers that bring sizes into the
UNet takes a third of the time and cost four steps two of a hundred pictures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from gguf_sd.demo.check_large import judge
from gguf_sd.demo.world_large import SIZE, Sampler, View, enlarged
from gguf_sd.models.vae import Autoencoder
from tools.demo_model.turbo import student
from tools.demo_model.turbo.paint import ONE_STEP, SHAPE, denoise
from tools.demo_model.turbo.text import TextEncoders
from tools.demo_model.turbo.trajectories import BATCH, SHARD, Trajectories
from tools.demo_model.turbo.unet import Told
from tools.demo_model.turbo.vae import CONFIG, draw

ENLARGED = 0.3  # of the student's own pictures
STUDENT = student.Plan(steps=1700, rate=3e-4, later=1.0)
TAUGHT = 0.9  # of each weight, the rest as it was before


@dataclass(frozen=True)
class DecoderPlan:
    seed: int = 0
    steps: int = 1500
    batch: int = 4  # full pictures
    rate: float = 5e-4
    keep: float = 0.99
    noise: float = 0.15  # of the latents' deviation, at most
    enlarged: float = 0.35  # of the pictures


def train_decoder(vae: Autoencoder, plan: DecoderPlan, log: Callable[[str], None]) -> Autoencoder:
    """Goes on training the decoder of ``vae``, in place; its encoder stays. Returns ``vae``."""
    torch.manual_seed(plan.seed)
    trained = nn.ModuleList([vae.post_quant_conv, vae.decoder]).requires_grad_(True)
    parameters = list[Tensor](trained.parameters())
    means = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=0)
    sampler = Sampler(plan.seed + 2, enlarged=plan.enlarged)
    recent: list[float] = []
    for step in range(plan.steps):
        for group in optimizer.param_groups:
            group["lr"] = plan.rate * min(1, (step + 1) / 20, (1 - step / plan.steps) / 0.7)
        drawn = draw(sampler, plan.batch)
        with torch.no_grad():
            latents = vae.encode(drawn.pictures)[0]
            level = plan.noise * latents.std() * torch.rand(plan.batch, 1, 1, 1)
            latents += level * torch.randn_like(latents)
        difference = vae.decode(latents * CONFIG.scaling_factor) - drawn.pictures
        optimizer.zero_grad()
        (drawn.weights * (difference.abs() + difference.square())).mean().backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(means, [p.detach() for p in parameters], 1 - min(plan.keep, step / (step + 10)))
        recent.append(difference.square().mean().item())
        if (step + 1) % 25 == 0:
            log(f"decoder {step + 1}, PSNR {10 * torch.log10(4 / torch.tensor(recent).mean()):.2f} dB")
            recent.clear()
    with torch.no_grad():
        for parameter, mean in zip(parameters, means, strict=True):
            parameter.copy_(mean)
    trained.requires_grad_(False)
    return vae


@torch.no_grad()
def own_shard(
    unet: nn.Module, vae: Autoencoder, text: TextEncoders, number: int, seed: int, count: int = SHARD
) -> dict[str, Tensor]:
    """What the student paints in one step of ``count`` scenes, other ones for each number, ENLARGED of them enlarged
    afterwards and told so; without the wrong pictures. Pictures that are cut are not checked."""
    sampler = Sampler(seed * 1_000_003 + 700_000 + number, enlarged=ENLARGED)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + 700_000 + number)
    parts: list[list[Tensor]] = []
    for start in range(0, count, BATCH):
        size = min(BATCH, count - start)
        scenes, views = sampler.draw(size), [sampler.view() for _ in range(size)]
        context, pooled = text.encode([scene.caption for scene in scenes])
        as_painted = [replace(view, original=SIZE) for view in views]
        noise = torch.randn(size, *SHAPE, generator=generator)
        told, painted = (torch.tensor([view.time_ids for view in some]).float() for some in (views, as_painted))
        latents = denoise(unet, Told(context, pooled, painted), noise, ONE_STEP)
        pictures = vae.decode(latents).clamp(-1, 1)
        rows = list[int]()
        for i, (scene, view) in enumerate(zip(scenes, views, strict=True)):
            if as_painted[i] != View() or judge(pictures[i], scene).all:
                rows.append(i)
            if view.original < SIZE:
                latents[i] = vae.encode(enlarged(pictures[i : i + 1], view.original))[0][0] * CONFIG.scaling_factor
        parts.append([value[rows] for value in (noise, latents, context, pooled, told)])
    names = (field.name for field in fields(Trajectories))
    return {name: torch.cat(column) for name, column in zip(names, zip(*parts, strict=True), strict=True)}


@torch.no_grad()
def averaged(before: nn.Module, after: nn.Module) -> nn.Module:
    """Returns ``after``, of whose weights a part is now those ``before``."""
    for old, new in zip(before.parameters(), after.parameters(), strict=True):
        new.copy_(torch.lerp(old, new, TAUGHT))
    return after


@torch.no_grad()
def steepest(pictures: Tensor) -> Tensor:
    """Of pictures [B, 3, H, W] in -1 ... 1 the largest difference of neighbouring pixels in any colour, [B], of 255."""
    across, down = (pictures.clamp(-1, 1).diff(dim=dim).abs().amax((1, 2, 3)) for dim in (2, 3))
    return torch.maximum(across, down) * 127.5
