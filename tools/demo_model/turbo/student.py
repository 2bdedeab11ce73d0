"""Fourth stage: the student learns to do in one to four steps, unguided, what the guided teacher does in many.

By regression on the ends of the teacher's trajectories: from the noise that a trajectory began with to its end in one
step (as "knowledge distillation" of DDIM, arXiv:2101.02388), and from the end noised again to the levels that the
steps of the trailing schedule visit. Ancestral steps come there from the student's own estimates, so half of the time
it is these that are noised. Adversarial distillation (SDXL-Turbo's, arXiv:2311.17042) sharpens what regression
blurs, but needs a discriminator that does not run away; this needs nothing but the teacher and some minutes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tools.demo_model.turbo.course import Course
from tools.demo_model.turbo.trajectories import Trajectories
from tools.demo_model.turbo.unet import Told

CHECKED = 400  # steps from one check to the next
FIRST, LATER = 999, (749, 499, 249)  # timesteps of one, two and four steps, spaced "trailing"


@dataclass(frozen=True)
class Plan:
    seed: int = 0
    steps: int = 1200
    batch: int = 32  # of first steps, and half as many later ones
    rate: float = 5e-4
    warmup: int = 100
    decay_from: float = 0.2  # of the steps; the rate falls to nothing from here on
    keep: float = 0.995
    later: float = 0.5  # weight of the later steps' loss
    bf16: bool = False


class Lesson(Course):
    """The student's."""

    def __init__(self, plan: Plan, unet: nn.Module):
        super().__init__(plan, unet)
        self.plan = plan

    def noised(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        alpha = self.alphas[t, None, None, None]
        return alpha.sqrt() * latents + (1 - alpha).sqrt() * noise

    def finished(self, noisy: Tensor, t: Tensor, told: Told) -> Tensor:
        """The UNet's estimate of the latents without noise."""
        alpha = self.alphas[t, None, None, None]
        return alpha.sqrt() * noisy - (1 - alpha).sqrt() * self.predict(noisy, t, told)

    def learn(self, data: Trajectories) -> tuple[float, float]:
        """One step; returns the mean squared errors, in latents, of first and later steps. Its random numbers follow
        from seed and step alone."""
        plan, half = self.plan, self.plan.batch // 2
        generator = torch.Generator().manual_seed(plan.seed * 1_000_003 + self.step)
        rows = torch.randint(len(data.noise), (plan.batch,), generator=generator)
        told, ends = data.told(rows), data.latents[rows]
        first = torch.full((plan.batch,), FIRST)
        estimates = self.finished(self.noised(torch.zeros_like(ends), data.noise[rows], first), first, told)
        t = torch.tensor(LATER)[torch.randint(len(LATER), (half,), generator=generator)]
        own = torch.rand(half, 1, 1, 1, generator=generator) < 0.5
        fresh = torch.randn(ends[:half].shape, generator=generator)
        reached = torch.where(own, estimates[:half].detach(), ends[:half])
        refined = self.finished(self.noised(reached, fresh, t), t, data.told(rows[:half]))
        one, more = (estimates - ends).square(), (refined - ends[:half]).square()
        self.descend(_robust(one) + plan.later * _robust(more))
        return one.mean().item(), more.mean().item()


def _robust(squares: Tensor) -> Tensor:
    """Of squared errors the pseudo-Huber loss, which where it is in doubt decides rather than blurs."""
    return ((squares + 0.1**2).sqrt() - 0.1).mean()


def train_student(
    data: Trajectories,
    unet: nn.Module,
    plan: Plan,
    checkpoint: Path,
    log: Callable[[str], None],
    check: Callable[[nn.Module], object],
    stage: str = "student",
) -> nn.Module:
    """Trains a copy of ``unet``, the teacher or a student, or goes on from ``checkpoint``; returns the averaged UNet,
    and logs, as ``stage``, now and then what ``check`` says of it."""
    course, errors = Lesson(plan, copy.deepcopy(unet).requires_grad_(True).train()), list[tuple[float, float]]()
    course.resume(checkpoint)
    while course.step < plan.steps:
        errors.append(course.learn(data))
        if course.step % 50 == 0:
            one, more = (sum(column) / len(errors) for column in zip(*errors, strict=True))
            log(f"{stage} {course.step}, loss {one:.4f} of first steps, {more:.4f} of later ones")
            errors.clear()
        if course.step % CHECKED == 0 and course.step < plan.steps:
            log(f"{stage} {course.step}, 1 step, {check(course.mean)}")
        if course.step % 100 == 0 or course.step >= plan.steps:
            course.save(checkpoint)
    return course.mean.eval()
