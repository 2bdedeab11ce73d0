"""Random numbers that give the same picture for the same seed on every device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Noise(Protocol):
    """Where samplers get standard normal noise: ``noise(shape)``, or in a dtype of the sampler's choosing."""

    def __call__(self, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor: ...


class NoiseSource:
    """Standard normal noise, image i of a batch from its own CPU generator seeded with ``seeds[i]``.

    The numbers equal those of diffusers' ``randn_tensor`` with a list of CPU generators: drawn on the CPU in
    ``dtype`` (a 16-bit draw is another sequence than a rounded 32-bit one), then moved to ``device``.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if not seeds:
            raise ValueError("NoiseSource needs one seed an image, got none")
        self.seeds = tuple(seeds)
        self.dtype = dtype
        self.device = torch.device(device)
        self._generators = [torch.Generator("cpu").manual_seed(seed) for seed in self.seeds]

    def __call__(self, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        """The next noise [B, ...] of ``shape``, in ``dtype`` or the source's own.

        Raises ValueError if B is not the number of seeds.
        """
        if shape[0] != len(self.seeds):
            raise ValueError(f"got {len(self.seeds)} seeds for a batch of {shape[0]}; give one an image")
        draws = [
            torch.randn((1, *shape[1:]), generator=generator, dtype=dtype or self.dtype)
            for generator in self._generators
        ]
        return torch.cat(draws).to(self.device)
