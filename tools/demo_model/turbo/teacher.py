"""Third stage: the teacher, an ordinary latent diffusion model with guidance, learns the world.

With SDXL's conditioning: what is told of sizes and crops is varied, see :class:`gguf_sd.demo.world_large.View`. The
loss is that of velocities at all timesteps alike, which minds errors where noise dominates: it is there that the
caption decides. It trains as diffusers' module, whose backward pass is faster than ours.
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
from tools.demo_model.turbo.unet import Lessons, predict, unet_config


@dataclass(frozen=True)
class Plan:
    seed: int = 0
    steps: int = 14000
    batch: int = 32
    rate: float = 1.2e-3
    decay_from: float = 0.4  # of the steps; the rate falls to nothing from here on
    unconditional: float = 0.1


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

    def learn(self, data: Lessons) -> float:
        """One step; returns the loss. Its random numbers follow from seed and step alone."""
        plan = self.plan
        generator = torch.Generator().manual_seed(plan.seed * 1_000_003 + self.step)
        rows = torch.randint(len(data.latents), (plan.batch,), generator=generator)
        t = torch.randint(len(self.alphas), (plan.batch,), generator=generator)
        noise = torch.randn(plan.batch, *data.latents.shape[1:], generator=generator)
        silent = torch.rand(plan.batch, generator=generator) < plan.unconditional
        alpha = self.alphas[t, None, None, None]
        noisy = alpha.sqrt() * data.latents[rows] + (1 - alpha).sqrt() * noise
        velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * data.latents[rows]
        loss = (predict(self.unet, noisy, t, data.told(rows).but(silent)) - velocity).square().mean()
        self.descend(loss)
        return loss.item()

    def descend(self, loss: Tensor) -> None:
        """A step of the optimiser, and of the running mean."""
        plan, progress = self.plan, self.step / self.plan.steps
        for group in self.optimizer.param_groups:
            group["lr"] = plan.rate * min(1, (self.step + 1) / 200, (1.02 - progress) / (1 - plan.decay_from))
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        with torch.no_grad():
            keep = min(0.998, self.step / (self.step + 10))
            means = list[Tensor](self.mean.parameters())
            torch._foreach_lerp_(means, [p.detach() for p in self.unet.parameters()], 1 - keep)


def train_teacher(data: Lessons, plan: Plan, checkpoint: Path, log: Callable[[str], None]) -> nn.Module:
    """Trains, or goes on from ``checkpoint``, and returns the averaged UNet."""
    course, errors, saved = Course(plan), list[float](), time.monotonic()
    if checkpoint.exists():
        course.resume(checkpoint)
    while course.step < plan.steps:
        errors.append(course.learn(data))
        if course.step % 50 == 0:
            log(f"teacher {course.step}, loss {sum(errors) / len(errors):.4f}")
            errors.clear()
        if time.monotonic() - saved > 60 or course.step >= plan.steps:
            partial = checkpoint.with_suffix(".partial")
            torch.save(course.state(), partial)
            partial.replace(checkpoint)
            saved = time.monotonic()
    return course.mean.eval()
