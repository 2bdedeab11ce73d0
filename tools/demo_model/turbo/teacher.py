"""Third stage: the teacher, an ordinary latent diffusion model with guidance, learns the world.

With SDXL's conditioning: what is told of sizes and crops is varied, see :class:`gguf_sd.demo.world_large.View`. The
loss is that of velocities, and three timesteps of four are of the later half, where noise dominates: it is there that
the caption decides. It trains as diffusers' module, whose backward pass is faster than ours.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from tools.demo_model.turbo.course import Course
from tools.demo_model.turbo.pictures import coupled
from tools.demo_model.turbo.unet import Lessons, new_unet

CHECKED = 1000  # steps from one check to the next


@dataclass(frozen=True)
class Plan:
    seed: int = 0
    steps: int = 7000
    batch: int = 32
    rate: float = 1.2e-3
    decay_from: float = 0.4  # of the steps; the rate falls to nothing from here on
    warmup: int = 200
    keep: float = 0.998
    unconditional: float = 0.1
    bf16: bool = False


class Lesson(Course):
    """The teacher's."""

    def __init__(self, plan: Plan):
        torch.manual_seed(plan.seed)
        super().__init__(plan, new_unet())
        self.plan = plan

    def learn(self, data: Lessons) -> float:
        """One step; returns the loss. Its random numbers follow from seed and step alone."""
        plan = self.plan
        generator = torch.Generator().manual_seed(plan.seed * 1_000_003 + self.step)
        rows = torch.randint(len(data.latents), (plan.batch,), generator=generator)
        t = torch.randint(len(self.alphas), (plan.batch,), generator=generator)
        t[::2] = (t[::2] + len(self.alphas)) // 2
        noise = coupled(torch.randn(plan.batch, *data.latents.shape[1:], generator=generator), data.moves[rows])
        silent = torch.rand(plan.batch, generator=generator) < plan.unconditional
        alpha = self.alphas[t, None, None, None]
        noisy = alpha.sqrt() * data.latents[rows] + (1 - alpha).sqrt() * noise
        velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * data.latents[rows]
        loss = (self.predict(noisy, t, data.told(rows).but(silent)) - velocity).square().mean()
        self.descend(loss)
        return loss.item()


def train_teacher(
    data: Lessons, plan: Plan, checkpoint: Path, log: Callable[[str], None], check: Callable[[nn.Module], object]
) -> nn.Module:
    """Trains, or goes on from ``checkpoint``, and returns the averaged UNet; logs now and then what ``check`` says of
    it."""
    course, errors, saved = Lesson(plan), list[float](), time.monotonic()
    course.resume(checkpoint)
    while course.step < plan.steps:
        errors.append(course.learn(data))
        if course.step % 50 == 0:
            log(f"teacher {course.step}, loss {sum(errors) / len(errors):.4f}")
            errors.clear()
        if course.step % CHECKED == 0 and course.step < plan.steps:
            log(f"teacher {course.step}, {check(course.mean)}")
        if time.monotonic() - saved > 60 or course.step >= plan.steps:
            course.save(checkpoint)
            saved = time.monotonic()
    return course.mean.eval()
