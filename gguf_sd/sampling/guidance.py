"""Encoded prompts, and the UNet under classifier-free guidance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Prompt(NamedTuple):
    """P encoded prompts: what the UNet attends to [P, N, context_dim], and SDXL's vector of pooled text and sizes
    [P, vector_dim]."""

    context: Tensor
    vector: Tensor | None = None


@dataclass(frozen=True)
class Conditioning:
    """The encoded prompts and, for guidance, the negative prompts, as many and as long: one for all pictures of a
    batch, or one each."""

    positive: Prompt
    negative: Prompt | None

    @classmethod
    def joined(cls, several: Sequence[Conditioning]) -> Conditioning:
        """One for a batch, from those of its pictures: all guided or none, all of one length."""
        if all(other is several[0] for other in several):
            return several[0]
        negatives = [one.negative for one in several if one.negative is not None]
        return cls(_stacked([one.positive for one in several]), _stacked(negatives) if negatives else None)


class Denoise(Protocol):
    """What predicts: a UNet, or what stands for it (:class:`gguf_sd.runtime.cuda_graph.GraphedUNet`)."""

    def project(self, context: Tensor) -> Tensor: ...

    def step(
        self,
        latents: Tensor,
        timesteps: Tensor,
        projected: Tensor,
        vector: Tensor | None = None,
        *,
        control: Sequence[Tensor] = (),
    ) -> Tensor: ...


class Predictor:
    """The UNet under classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598).

    What the UNet takes from the prompts is computed once and serves every step.
    """

    @torch.inference_mode()
    def __init__(self, unet: Denoise, conditioning: Conditioning, guidance: float, batched: bool, extra: Tensor | None):
        self.unet, self.guidance = unet, guidance
        self.extra = extra  # channels of an inpainting checkpoint, [B, 5, h, w]
        positive, negative = conditioning.positive, conditioning.negative
        prompts = [positive] if negative is None else [negative, positive]
        self.passes = [self._projected(some) for some in ([prompts] if batched else [[prompt] for prompt in prompts])]
        self.prompts = len(positive.context)
        self.repeats = 1  # how often each prompt stands in the passes: once a picture

    def _projected(self, prompts: Sequence[Prompt]) -> Prompt:
        """The prompts of a pass, their keys and values in place of the context: [prompts, N, …]."""
        context, vector = _stacked(prompts)
        return Prompt(self.unet.project(context), vector)

    @torch.inference_mode()
    def __call__(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """latents [B, 4, h, w], 0-dim timestep -> prediction [B, 4, h, w]; B is a multiple of the prompts."""
        repeats = len(latents) // self.prompts
        if repeats != self.repeats:
            self.passes = [_repeated(some, self.repeats, repeats) for some in self.passes]
            self.repeats = repeats
        whole = latents if self.extra is None else torch.cat([latents, self.extra], dim=1)
        predictions = [self._run(whole, timestep, prompts) for prompts in self.passes]
        both = torch.cat(predictions).split(len(latents))
        if len(both) == 1:
            return both[0]
        without, with_prompt = both
        return without + self.guidance * (with_prompt - without)

    def _run(self, latents: Tensor, timestep: Tensor, prompts: Prompt) -> Tensor:
        """The predictions for each prompt of a pass in turn, [prompts * B, 4, h, w].

        On a CPU a UNet that takes nothing but latents ahead of the prompts computes its beginning once for both halves
        of guidance; a GPU's kernels were measured, and its graphs captured, for whole batches."""
        shared = latents.device.type == "cpu" and prompts.vector is None
        repeated = latents if shared else latents.repeat(len(prompts.context) // len(latents), 1, 1, 1)
        return self.unet.step(repeated, timestep.expand(len(repeated)), prompts.context, prompts.vector)


def _stacked(prompts: Sequence[Prompt]) -> Prompt:
    vectors = [prompt.vector for prompt in prompts if prompt.vector is not None]
    return Prompt(torch.cat([prompt.context for prompt in prompts]), torch.cat(vectors) if vectors else None)


def _repeated(prompts: Prompt, before: int, repeats: int) -> Prompt:
    """Each prompt ``repeats`` times in place of ``before``."""
    context, vector = prompts.context[::before].repeat_interleave(repeats, dim=0), prompts.vector
    return Prompt(context, None if vector is None else vector[::before].repeat_interleave(repeats, dim=0))
