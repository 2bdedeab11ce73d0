"""What both trainings have, the teacher's and the student's: a UNet, its optimiser, the mean of its weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gguf_sd.config import SchedulerConfig
from gguf_sd.sampling.schedules import alphas_cumprod
from tools.demo_model.turbo.unet import Told, predict

PARTS = ("unet", "mean", "optimizer")


class Pace(Protocol):
    """What a plan says of its steps: the rate rises over ``warmup`` of them, and falls to nothing from the share
    ``decay_from`` on; ``keep`` is how much of the running mean stays at each; ``bf16``: products are made in it."""

    @property
    def steps(self) -> int: ...
    @property
    def rate(self) -> float: ...
    @property
    def warmup(self) -> int: ...
    @property
    def decay_from(self) -> float: ...
    @property
    def keep(self) -> float: ...
    @property
    def bf16(self) -> bool: ...


class Course:
    """All that a checkpoint must hold. Of ``unet`` what takes a gradient is trained."""

    def __init__(self, pace: Pace, unet: nn.Module):
        self.pace = pace
        self.unet = unet
        self.mean = copy.deepcopy(unet).requires_grad_(False)
        trained = [p for p in unet.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        self.step = 0
        self.alphas = alphas_cumprod(SchedulerConfig()).float()

    def save(self, path: Path) -> None:
        partial = path.with_suffix(".partial")
        torch.save({"step": self.step, **{name: getattr(self, name).state_dict() for name in PARTS}}, partial)
        partial.replace(path)

    def resume(self, path: Path) -> None:
        """Where there is a checkpoint, goes on from it."""
        if path.exists():
            saved: dict[str, Any] = torch.load(path, weights_only=True)
            for name in PARTS:
                getattr(self, name).load_state_dict(saved[name])
            self.step = saved["step"]

    def predict(self, noisy: Tensor, t: Tensor, told: Told) -> Tensor:
        """As :func:`predict`, of the UNet in training."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.pace.bf16):
            return predict(self.unet, noisy, t, told).float()

    def descend(self, loss: Tensor) -> None:
        """A step of the optimiser, and of the running mean."""
        pace, progress = self.pace, self.step / self.pace.steps
        for group in self.optimizer.param_groups:
            group["lr"] = pace.rate * min(1, (self.step + 1) / pace.warmup, (1.01 - progress) / (1 - pace.decay_from))
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        with torch.no_grad():
            keep = min(pace.keep, self.step / (self.step + 10))
            means = list[Tensor](self.mean.parameters())
            torch._foreach_lerp_(means, [p.detach() for p in self.unet.parameters()], 1 - keep)
