"""ControlNet (Zhang et al. 2023, arXiv:2302.05543): a picture of edges, depths or poses that steers a UNet.

A copy of the UNet's way down and its middle takes the picture in behind its first convolution; what its blocks give is
added to what the UNet's own give.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from gguf_sd.config import ControlConfig
from gguf_sd.models.layers import Conv2d, Pointwise
from gguf_sd.models.unet import UNetEncoder


class ControlNet(UNetEncoder):
    """The state dict has the names of the original checkpoints without ``control_model.``."""

    def __init__(self, config: ControlConfig):
        super().__init__(config.unet)
        hints, width = config.hint_channels, config.unet.block_out_channels[0]
        layers: list[nn.Module] = [Conv2d(config.picture_channels, hints[0], 3, padding=1), nn.SiLU()]
        for channels, out in pairwise(hints):
            layers += [Conv2d(channels, channels, 3, padding=1), nn.SiLU()]
            layers += [Conv2d(channels, out, 3, stride=2, padding=1), nn.SiLU()]
        self.input_hint_block = nn.Sequential(*layers, Conv2d(hints[-1], width, 3, padding=1))
        self.zero_convs = nn.ModuleList(nn.Sequential(Pointwise(skip, skip)) for skip in self.skips)
        last = config.unet.block_out_channels[-1]
        self.middle_block_out = nn.Sequential(Pointwise(last, last))
        self._find_cross_attentions()

    def hint(self, picture: Tensor) -> Tensor:
        """A picture [B, 3, 8H, 8W], 0 … 1, as :meth:`step` takes it: [B, width, H, W]. The same at every step."""
        return self.input_hint_block(picture.contiguous(memory_format=torch.channels_last))

    def step(
        self,
        latents: Tensor,
        timesteps: Tensor,
        projected: Tensor,
        hint: Tensor,
        vector: Tensor | None = None,
        scale: float = 1.0,
    ) -> list[Tensor]:
        """What is added to the results of the UNet's blocks, ``scale`` times: latents [B, in_channels, H, W],
        timesteps [B], the prompt's keys and values from :meth:`project`, hint [B or 1, width, H, W]."""
        emb = self.embed(timesteps, vector, latents.dtype)
        skips, middle = self.down(latents.contiguous(memory_format=torch.channels_last), emb, projected, hint)
        added = [zero(skip) for zero, skip in zip(self.zero_convs, skips, strict=True)]
        added.append(self.middle_block_out(middle))
        return added if scale == 1 else [x.mul_(scale) for x in added]
