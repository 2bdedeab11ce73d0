"""The UNet: learns to paint in one step what the program that paints the world would paint, and to go on from there.

A distilled model is taught by a model that maps noise to pictures in many steps. Here the world's own program is that
teacher: four means of the noise are the offsets of the scene, so that caption and noise decide the picture, and the
UNet is taught to give it in one step from noise alone (t = 999). For the later steps of two to four it learns at other
timesteps what every diffusion model learns. There is no guidance in it, and none is needed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from gguf_sd.config import SchedulerConfig
from gguf_sd.sampling.schedules import alphas_cumprod
from tools.demo_model.turbo.pictures import Pictures, noise_for
from tools.demo_model.turbo.text import POOLED
from tools.demo_model.turbo.vae import SCALING

WIDTHS, DEPTHS, CONTEXT, SIZE_WIDTH = (32, 64, 128), (0, 1, 2), 256, 256


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


@dataclass(frozen=True)
class Plan:
    seed: int = 0
    steps: int = 4000
    batch: int = 16
    rate: float = 1.5e-3
    decay_from: float = 0.5  # of the steps; the rate falls to nothing from here on
    one_step: float = 0.55  # of the batch, taught from noise alone


@dataclass(frozen=True)
class Lessons:
    """Everything the UNet trains on; each caption is encoded once."""

    latents: Tensor  # [N, 4, 16, 16], scaled
    means: Tensor  # [N, 4]
    time_ids: Tensor  # [N, 6]
    caption: Tensor  # [N] rows of contexts and pooled
    contexts: Tensor  # [M, LENGTH, CONTEXT]
    pooled: Tensor  # [M, POOLED]


def lessons(pictures: Pictures, encode: Callable[[list[str]], tuple[Tensor, Tensor]]) -> Lessons:
    told = sorted(set(pictures.captions))
    row = {caption: i for i, caption in enumerate(told)}
    rows = torch.tensor([row[caption] for caption in pictures.captions])
    return Lessons(pictures.latents * SCALING, pictures.means, pictures.time_ids, rows, *encode(told))


class Course:
    """UNet, optimiser and the running mean of the weights; all that a checkpoint must hold."""

    def __init__(self, plan: Plan):
        torch.manual_seed(plan.seed)
        self.plan = plan
        self.unet = UNet2DConditionModel(**unet_config())
        self.mean = UNet2DConditionModel(**unet_config()).requires_grad_(False)
        self.mean.load_state_dict(self.unet.state_dict())
        self.optimizer = torch.optim.AdamW(self.unet.parameters(), betas=(0.9, 0.99), weight_decay=0.01)
        self.step = 0
        self.alphas = alphas_cumprod(SchedulerConfig()).float()

    def state(self) -> dict[str, Any]:
        parts = {"unet": self.unet, "mean": self.mean, "optimizer": self.optimizer}
        return {"step": self.step, **{name: part.state_dict() for name, part in parts.items()}}

    def resume(self, path: Path) -> None:
        saved = torch.load(path, weights_only=True)
        for name in ("unet", "mean", "optimizer"):
            getattr(self, name).load_state_dict(saved[name])
        self.step = saved["step"]

    def learn(self, data: Lessons) -> tuple[float, float]:
        """One step; returns the errors of the one-step pictures and of the others, of latents of unit deviation. Its
        random numbers follow from seed and step alone."""
        plan = self.plan
        generator = torch.Generator().manual_seed(plan.seed * 1_000_003 + self.step)
        rows = torch.randint(len(data.latents), (plan.batch,), generator=generator)
        noise = torch.randn(plan.batch, *data.latents.shape[1:], generator=generator)
        t = torch.randint(150, 950, (plan.batch,), generator=generator)
        first = torch.arange(plan.batch) < plan.one_step * plan.batch
        last = len(self.alphas) - 1
        t = torch.where(first, last, t)
        latents = data.latents[rows]
        noise = torch.where(first[:, None, None, None], noise_for(data.means[rows], noise), noise)
        alpha = self.alphas[t, None, None, None]
        seen = torch.where(first[:, None, None, None], 0, alpha.sqrt()) * latents  # a sampler starts from noise alone
        noisy = seen + (1 - alpha).sqrt() * noise
        v = predict(self.unet, noisy, t, data.contexts[data.caption[rows]], data.pooled[data.caption[rows]],
                    data.time_ids[rows])  # fmt: skip
        denoised = alpha.sqrt() * noisy - (1 - alpha).sqrt() * v
        wrong = (denoised - latents).square().mean((1, 2, 3))
        errors = wrong / (1 - alpha[:, 0, 0, 0])  # of v
        progress = self.step / plan.steps
        for group in self.optimizer.param_groups:
            group["lr"] = plan.rate * min(1, (self.step + 1) / 100, (1.01 - progress) / (1 - plan.decay_from))
        self.optimizer.zero_grad()
        errors.mean().backward()
        nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        with torch.no_grad():
            keep = min(0.995, self.step / (self.step + 10))
            means = list[Tensor](self.mean.parameters())
            torch._foreach_lerp_(means, [p.detach() for p in self.unet.parameters()], 1 - keep)
        return wrong[first].mean().item(), wrong[~first].mean().item()


def predict(unet: nn.Module, noisy: Tensor, t: Tensor, context: Tensor, pooled: Tensor, time_ids: Tensor) -> Tensor:
    """v [B, 4, h, w]."""
    added = {"text_embeds": pooled, "time_ids": time_ids}
    v: Tensor = unet(noisy, t, context, added_cond_kwargs=added).sample
    return v


def train_unet(data: Lessons, plan: Plan, checkpoint: Path, log: Callable[[str], None]) -> nn.Module:
    """Trains, or goes on from ``checkpoint``, and returns the averaged UNet."""
    course, errors, saved = Course(plan), list[tuple[float, float]](), time.monotonic()
    if checkpoint.exists():
        course.resume(checkpoint)
    while course.step < plan.steps:
        errors.append(course.learn(data))
        if course.step % 50 == 0:
            one, other = torch.tensor(errors).mean(0).tolist()
            log(f"unet {course.step}, one step {one:.4f}, other timesteps {other:.4f}")
            errors.clear()
        if time.monotonic() - saved > 60 or course.step >= plan.steps:
            partial = checkpoint.with_suffix(".partial")
            torch.save(course.state(), partial)
            partial.replace(checkpoint)
            saved = time.monotonic()
    return course.mean.eval()
