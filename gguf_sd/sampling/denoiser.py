"""From what the UNet predicts (epsilon, v or the sample itself) to what samplers use: denoised and eps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gguf_sd.errors import GgufSdError

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")

# model(latents [B, C, H, W] as the UNet wants them, timestep: 0-dim tensor) -> prediction [B, C, H, W]
Model = Callable[[Tensor, Tensor], Tensor]


class Level(NamedTuple):
    """A noise level: latents are alpha * x0 + sigma * eps, alpha^2 + sigma^2 = 1. Both 0-dim."""

    alpha: Tensor
    sigma: Tensor

    @classmethod
    def from_ratio(cls, ratio: Tensor) -> Level:
        """From k-diffusion's sigma, the noise-to-signal ratio."""
        alpha = 1 / (ratio**2 + 1) ** 0.5
        return cls(alpha, ratio * alpha)

    @classmethod
    def from_alpha_cumprod(cls, alpha_cumprod: Tensor) -> Level:
        """From the product of the training alphas, which is alpha^2."""
        return cls(alpha_cumprod**0.5, (1 - alpha_cumprod) ** 0.5)


class Prediction(NamedTuple):
    """The two halves a model splits noisy latents into, each [B, C, H, W]."""

    denoised: Tensor
    eps: Tensor


@dataclass(frozen=True)
class Denoiser:
    """Calls the model in the dtype it wants; all arithmetic around it stays in that of the latents x.

    Raises GgufSdError for an unknown prediction type. v_prediction is that of Salimans & Ho 2022
    (arXiv:2202.00512): v = alpha * eps - sigma * x0.
    """

    model: Model
    prediction_type: str = "epsilon"
    dtype: torch.dtype = torch.float32  # what the model is fed

    def __post_init__(self) -> None:
        if self.prediction_type not in PREDICTION_TYPES:
            raise GgufSdError(
                f"unknown prediction type {self.prediction_type!r}; choose from {', '.join(PREDICTION_TYPES)}"
            )

    def output(self, x: Tensor, timestep: Tensor) -> Tensor:
        """The model's raw output for variance-preserving latents x, in the dtype of x."""
        return self.model(x.to(self.dtype), timestep).to(x.dtype)

    def split(self, output: Tensor, x: Tensor, level: Level) -> Prediction:
        """What a raw output says of variance-preserving latents x at this noise level."""
        alpha, sigma = level
        if self.prediction_type == "epsilon":
            return Prediction((x - sigma * output) / alpha, output)
        if self.prediction_type == "v_prediction":
            return Prediction(alpha * x - sigma * output, alpha * output + sigma * x)
        return Prediction(output, (x - alpha * output) / sigma)

    def predict(self, x: Tensor, timestep: Tensor, level: Level) -> Prediction:
        """Runs the model on variance-preserving latents x at this noise level."""
        return self.split(self.output(x, timestep), x, level)

    def denoise(self, x: Tensor, timestep: Tensor, sigma: Tensor) -> Tensor:
        """Runs the model on x = x0 + sigma * eps and returns its estimate of x0."""
        level = Level.from_ratio(sigma)
        return self.predict(x * level.alpha, timestep, level).denoised
