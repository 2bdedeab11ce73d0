"""Third stage: the UNet learns to predict the noise in latents of the world's pictures, told their captions.

Pictures and captions are encoded once, beforehand; the autoencoder and the text encoder stay as they are.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from gguf_sd.config import SchedulerConfig, UNetConfig
from gguf_sd.demo.world import Sampler, render
from gguf_sd.models.unet import UNet
from gguf_sd.models.vae import Autoencoder
from gguf_sd.sampling.schedules import alphas_cumprod
from tools.demo_model.train_text import WIDTH
from tools.demo_model.vocabulary import token_ids

UNET = UNetConfig(
    block_out_channels=(64, 128),
    layers_per_block=1,
    transformer_layers=(1, 1),
    num_heads=(2, 4),
    context_dim=WIDTH,
    norm_groups=16,
)
Log = Callable[[str], None]


@dataclass(frozen=True)
class Lessons:
    """Everything the UNet trains on. ``contexts`` holds each caption once, the empty one first."""

    latents: Tensor  # [N, 4, 8, 8], scaled to unit deviation
    caption: Tensor  # [N] rows of contexts
    contexts: Tensor  # [M, LENGTH, WIDTH]


@torch.no_grad()
def encode_pictures(vae: Autoencoder, count: int, seed: int) -> tuple[Tensor, list[str]]:
    """Latents (unscaled means) [count, 4, 8, 8] of freshly painted scenes, and their captions."""
    sampler, rng = Sampler(seed, pairs=0.55), random.Random(seed + 1)
    latents, captions = [], []
    for start in range(0, count, 64):
        drawn = sampler.draw(min(64, count - start))
        latents.append(vae.encode(render([scene for scene, _ in drawn], rng))[0])
        captions += [caption for _, caption in drawn]
    return torch.cat(latents).contiguous(), captions


@torch.no_grad()
def encode_captions(text: nn.Module, captions: list[str]) -> Tensor:
    """Captions -> [B, LENGTH, WIDTH]."""
    parts = [captions[i : i + 64] for i in range(0, len(captions), 64)]
    return torch.cat([text(input_ids=torch.tensor(token_ids(part))).last_hidden_state for part in parts])


def lessons(text: nn.Module, latents: Tensor, captions: list[str]) -> Lessons:
    """Scaled latents [N, 4, 8, 8] with the captions that go with them."""
    told = ["", *sorted(set(captions))]
    row = {caption: i for i, caption in enumerate(told)}
    return Lessons(latents, torch.tensor([row[c] for c in captions]), encode_captions(text, told))


def loss_weights(config: SchedulerConfig) -> Tensor:
    """Weight of each timestep: the square root of noise over signal, within 0.4 ... 4. What stands where is
    decided where noise dominates, and plain eps loss hardly counts errors there."""
    alphas = alphas_cumprod(config)
    return ((1 - alphas) / alphas).sqrt().clamp(0.4, 4).float()


@dataclass(frozen=True)
class Plan:
    """How long to train: until ``steps``, or ``seconds`` of training if that is sooner."""

    seed: int = 0
    steps: int = 13000
    seconds: float = float("inf")
    batch: int = 32
    rate: float = 1.2e-3
    unconditional: float = 0.1


class Course:
    """UNet, optimiser and the running mean of the weights; all that a checkpoint must hold."""

    def __init__(self, plan: Plan):
        torch.manual_seed(plan.seed)
        self.plan = plan
        self.unet = UNet(UNET)
        self.mean = UNet(UNET).requires_grad_(False)
        self.mean.load_state_dict(self.unet.state_dict())
        self.optimizer = torch.optim.AdamW(self.unet.parameters(), betas=(0.9, 0.99), weight_decay=0.01)
        self.step, self.seconds = 0, 0.0
        self.alphas = alphas_cumprod(SchedulerConfig()).float()
        self.weights = loss_weights(SchedulerConfig())

    def state(self) -> dict[str, object]:
        return {
            "unet": self.unet.state_dict(),
            "mean": self.mean.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "at": (self.step, self.seconds),
        }

    def resume(self, path: Path) -> None:
        saved = torch.load(path, weights_only=True)
        self.unet.load_state_dict(saved["unet"])
        self.mean.load_state_dict(saved["mean"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step, self.seconds = saved["at"]

    @property
    def done(self) -> float:
        """Share of the training behind us."""
        return max(self.step / self.plan.steps, self.seconds / self.plan.seconds)

    def learn(self, data: Lessons) -> float:
        """One step; returns the unweighted loss. Its random numbers follow from seed and step alone."""
        plan, started = self.plan, time.monotonic()
        generator = torch.Generator().manual_seed(plan.seed * 1_000_003 + self.step)
        rows = torch.randint(len(data.latents), (plan.batch,), generator=generator)
        t = torch.randint(len(self.alphas), (plan.batch,), generator=generator)
        noise = torch.randn(plan.batch, *data.latents.shape[1:], generator=generator)
        told = torch.rand(plan.batch, generator=generator) >= plan.unconditional
        alpha = self.alphas[t, None, None, None]
        noisy = alpha.sqrt() * data.latents[rows] + (1 - alpha).sqrt() * noise
        predicted = self.unet(noisy, t, data.contexts[data.caption[rows] * told])
        errors = (predicted - noise).square().mean((1, 2, 3))
        for group in self.optimizer.param_groups:
            group["lr"] = plan.rate * min(1, (self.step + 1) / 200, (1.02 - self.done) / 0.5)
        self.optimizer.zero_grad()
        (errors * self.weights[t]).mean().backward()
        nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        self._average(min(0.998, self.step / (self.step + 10)))
        self.seconds += min(time.monotonic() - started, 10)  # a pause is no training
        return errors.mean().item()

    @torch.no_grad()
    def _average(self, keep: float) -> None:
        means, values = list[Tensor](self.mean.parameters()), [p.detach() for p in self.unet.parameters()]
        torch._foreach_lerp_(means, values, 1 - keep)


def train_unet(data: Lessons, plan: Plan, checkpoint: Path, log: Log) -> UNet:
    """Trains, or goes on from ``checkpoint``, and returns the averaged UNet."""
    course, losses, saved = Course(plan), list[float](), time.monotonic()
    if checkpoint.exists():
        course.resume(checkpoint)
    while course.done < 1:
        losses.append(course.learn(data))
        if course.step % 100 == 0:
            log(f"unet {course.step} {course.seconds:.0f} s, loss {sum(losses) / len(losses):.4f}")
            losses.clear()
        if time.monotonic() - saved > 120 or course.done >= 1:
            partial = checkpoint.with_suffix(".partial")
            torch.save(course.state(), partial)
            partial.replace(checkpoint)
            saved = time.monotonic()
    return course.mean.eval()
