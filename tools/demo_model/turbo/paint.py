"""Pictures from the parts in training, without a file between: captions of the larger world in, tensors out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gguf_sd.config import SchedulerConfig
from gguf_sd.demo.world_large import SIZE, View
from gguf_sd.models.vae import Autoencoder
from gguf_sd.sampling import Noise, NoiseSource, Schedule, make_schedule, sample
from tools.demo_model.turbo.text import TextEncoders
from tools.demo_model.turbo.unet import Told, predict

SCHEDULER = SchedulerConfig(prediction_type="v_prediction", timestep_spacing="trailing")
SHAPE = (4, SIZE // 8, SIZE // 8)  # of a picture's latents


@dataclass(frozen=True)
class Sampling:
    """How a UNet is asked for pictures; of a ``guidance`` of 1 or less there is none."""

    sampler: str
    steps: int
    guidance: float

    @property
    def schedule(self) -> Schedule:
        return make_schedule(SCHEDULER, self.sampler, "model", self.steps)


TEACHER = Sampling("dpmpp_2m", 20, 1.5)
ONE_STEP = Sampling("euler", 1, 0.0)  # as the ancestral one, which draws noise and adds none


def student(steps: int) -> Sampling:
    """As SDXL-Turbo is sampled: Euler's ancestral steps, without guidance."""
    return Sampling("euler_a", steps, 0.0)


@torch.no_grad()
def denoise(unet: nn.Module, told: Told, start: Tensor, how: Sampling, noise: Noise | None = None) -> Tensor:
    """Noise of unit deviation [B, 4, h, w] -> scaled latents of what the UNet is told."""
    count = len(start)
    both = told.twice(torch.arange(2 * count) < count) if how.guidance > 1 else told

    def denoiser(noisy: Tensor, timestep: Tensor) -> Tensor:
        if how.guidance <= 1:
            return predict(unet, noisy, timestep.expand(count), both)
        both_ways = predict(unet, noisy.repeat(2, 1, 1, 1), timestep.expand(2 * count), both)
        without, with_text = both_ways.chunk(2)
        return without + how.guidance * (with_text - without)

    *_, last = sample(denoiser, start, how.schedule, noise)
    return last.latents


class Painter:
    """Paints batches of captions; picture i of all it ever paints starts from the noise of seed + i."""

    def __init__(
        self, unet: nn.Module, vae: Autoencoder, text: TextEncoders, how: Sampling, view: View | None = None
    ) -> None:
        self.unet, self.vae, self.text, self.how = unet, vae, text, how
        self.time_ids = torch.tensor((view or View()).time_ids).float()
        self.seed = 0

    @torch.no_grad()
    def __call__(self, captions: list[str]) -> Tensor:
        """Captions -> pictures [B, 3, SIZE, SIZE], about -1 ... 1."""
        count = len(captions)
        told = Told(*self.text.encode(captions), self.time_ids.expand(count, -1))
        noise = NoiseSource(range(self.seed, self.seed + count))
        self.seed += count
        return self.vae.decode(denoise(self.unet, told, noise((count, *SHAPE)), self.how, noise))
