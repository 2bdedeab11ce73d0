"""Pictures from the parts in training, without a file between: captions of the world in, tensors out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gguf_sd.config import SchedulerConfig
from gguf_sd.models.unet import UNet
from gguf_sd.models.vae import Autoencoder
from gguf_sd.sampling import make_schedule, sample
from tools.demo_model.vocabulary import token_ids

SAMPLER, SPACING, STEPS, GUIDANCE = "dpmpp_2m", "linspace", 20, 2.0


class Painter:
    """Paints batches of captions; picture i of all it ever paints starts from the noise of seed + i."""

    def __init__(self, unet: UNet, vae: Autoencoder, text: nn.Module, steps: int = STEPS, guidance: float = GUIDANCE):
        self.unet, self.vae, self.text = unet, vae, text
        self.guidance = guidance
        self.schedule = make_schedule(SchedulerConfig(), SAMPLER, SPACING, steps)
        self.seed = 0

    @torch.no_grad()
    def __call__(self, captions: list[str]) -> Tensor:
        """Captions of the world -> pictures [B, 3, 64, 64], about -1 ... 1."""
        told = self.text(input_ids=torch.tensor(token_ids(captions))).last_hidden_state
        untold = self.text(input_ids=torch.tensor(token_ids([""]))).last_hidden_state.expand_as(told)
        context = torch.cat([untold, told])

        def guided(latents: Tensor, timestep: Tensor) -> Tensor:
            both = self.unet(latents.repeat(2, 1, 1, 1), timestep.expand(len(context)), context)
            without, with_text = both.chunk(2)
            return without + self.guidance * (with_text - without)

        generators = [torch.Generator().manual_seed(self.seed + i) for i in range(len(captions))]
        self.seed += len(captions)
        noise = torch.stack([torch.randn(4, 8, 8, generator=generator) for generator in generators])
        *_, last = sample(guided, noise, self.schedule)
        return self.vae.decode(last.latents)
