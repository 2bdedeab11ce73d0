"""A UNet under ControlNets: it stands for the UNet, and adds what they make of their pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gguf_sd.models.controlnet import ControlNet
from gguf_sd.sampling.guidance import Denoise


@dataclass(frozen=True)
class Controller:
    """A ControlNet and what it does: ``picture`` [1, 3, H, W], 0 … 1; ``scale``: how much of what it says is added;
    ``start`` and ``end``: between which shares of all evaluations of the model."""

    net: ControlNet
    picture: Tensor
    scale: float
    start: float
    end: float

    def active(self, evaluation: int, evaluations: int) -> bool:
        """Whether it has a say in one of so many evaluations, counted from 0; the rule is diffusers'."""
        return evaluation / evaluations >= self.start and (evaluation + 1) / evaluations <= self.end


class Controlled:
    """Runs the ControlNets before each of the UNet's steps, for one run of a sampler.

    ``evaluations``: how often the sampler asks the model in all; ``passes``: how often the UNet runs for each, 2 where
    guidance is not in one call. What all nets take from the prompt lies beside what the UNet takes from it.
    """

    @torch.inference_mode()
    def __init__(self, unet: Denoise, controllers: Sequence[Controller], evaluations: int, passes: int):
        self.unet, self.controllers = unet, controllers
        self.evaluations, self.passes = evaluations, passes
        self.hints = [x.net.hint(x.picture.to(next(x.net.parameters()))) for x in controllers]
        self.widths: list[int] = []  # of what each takes from the prompt, the UNet first
        self.steps = 0

    def project(self, context: Tensor) -> Tensor:
        """Keys and values of the UNet and of all nets, side by side: [B, M, context_dim] -> [B, M, …]."""
        taken = [self.unet.project(context), *(x.net.project(context) for x in self.controllers)]
        self.widths = [one.shape[-1] for one in taken]
        return torch.cat(taken, dim=-1)

    def step(
        self,
        latents: Tensor,
        timesteps: Tensor,
        projected: Tensor,
        vector: Tensor | None = None,
        *,
        control: Sequence[Tensor] = (),
    ) -> Tensor:
        """As :meth:`gguf_sd.models.unet.UNet.step`; ``projected`` from :meth:`project`. Of several nets, what they add
        is summed."""
        evaluation, self.steps = self.steps // self.passes, self.steps + 1
        own, *theirs = projected.split(self.widths, dim=-1)
        added: list[Tensor] = list(control)
        for controller, hint, taken in zip(self.controllers, self.hints, theirs, strict=True):
            if not controller.scale or not controller.active(evaluation, self.evaluations):
                continue
            seen = latents[:, : controller.net.config.in_channels]  # without an inpainting UNet's mask and picture
            one = controller.net.step(seen, timesteps, taken, hint, vector, controller.scale)
            added = [a.add_(b) for a, b in zip(added, one, strict=True)] if added else one
            del one  # as much as all of the UNet's skips
        return self.unet.step(latents, timesteps, own, vector, control=added)
