"""Pictures from the parts in training, without a file between: captions of the larger world in, tensors out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gguf_sd.config import SchedulerConfig
from gguf_sd.demo.world_large import View
from gguf_sd.models.vae import Autoencoder
from gguf_sd.sampling import NoiseSource, make_schedule, sample
from tools.demo_model.turbo.text import TextEncoders
from tools.demo_model.turbo.unet import predict

SAMPLER, SPACING, GUIDANCE = "euler_a", "trailing", 0.0
SCHEDULER = SchedulerConfig(prediction_type="v_prediction", timestep_spacing=SPACING)


class Painter:
    """Paints batches of captions; picture i of all it ever paints starts from the noise of seed + i."""

    def __init__(self, unet: nn.Module, vae: Autoencoder, text: TextEncoders, steps: int = 1, view: View | None = None):
        self.unet, self.vae, self.text = unet, vae, text
        self.schedule = make_schedule(SCHEDULER, SAMPLER, SPACING, steps)
        self.time_ids = torch.tensor((view or View()).time_ids).float()
        self.seed = 0

    @torch.no_grad()
    def latents(self, captions: list[str]) -> Tensor:
        """Captions -> scaled latents [B, 4, 16, 16]."""
        context, pooled = self.text.encode(captions)
        sizes = self.time_ids.expand(len(captions), -1)

        def denoiser(noisy: Tensor, timestep: Tensor) -> Tensor:
            return predict(self.unet, noisy, timestep.expand(len(captions)), context, pooled, sizes)

        noise = NoiseSource(range(self.seed, self.seed + len(captions)))
        self.seed += len(captions)
        *_, last = sample(denoiser, noise((len(captions), 4, 16, 16)), self.schedule, noise)
        return last.latents

    def __call__(self, captions: list[str]) -> Tensor:
        """Captions -> pictures [B, 3, 128, 128], about -1 ... 1."""
        with torch.no_grad():
            return self.vae.decode(self.latents(captions))
