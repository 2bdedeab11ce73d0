"""Classifier-free guidance around a UNet to compute in the head."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gguf_sd.sampling.guidance import Conditioning, Predictor, Prompt


class Product:
    """Predicts latents times ten times the context's mean plus the vector's and the timestep, for every prompt."""

    def __init__(self) -> None:
        self.projected = 0
        self.batches: list[int] = []

    def project(self, context: Tensor) -> Tensor:
        self.projected += len(context)
        return 10 * context

    def step(self, latents: Tensor, timesteps: Tensor, projected: Tensor, vector: Tensor | None = None) -> Tensor:
        self.batches.append(len(latents))
        assert len(latents) == len(timesteps)
        assert len(projected) % len(latents) == 0
        latents, timesteps = (x.repeat(len(projected) // len(x), *[1] * (x.dim() - 1)) for x in (latents, timesteps))
        of_prompt = projected.mean((1, 2)) + (0 if vector is None else vector.mean(1)) + timesteps
        return latents * of_prompt[:, None, None, None]


def prompt(value: float, vector: float | None) -> Prompt:
    return Prompt(torch.full((1, 3, 2), float(value)), None if vector is None else torch.full((1, 4), vector))


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("vector", [None, 0.5])
def test_guidance(batched: bool, vector: float | None) -> None:
    unet = Product()
    predict = Predictor(unet, Conditioning(prompt(3, vector), prompt(1, vector)), 7.0, batched, None)
    for batch in (1, 3, 2, 1):
        latents = torch.arange(1.0, batch + 1)[:, None, None, None].expand(-1, 4, 2, 2)
        for timestep in (100.0, 50.0):
            without, with_prompt = (10 * value + (vector or 0) + timestep for value in (1, 3))
            expected = latents * (without + 7 * (with_prompt - without))
            assert torch.allclose(predict(latents, torch.tensor(timestep)), expected)
    assert unet.projected == 2, "the prompts' keys and values do not change from step to step"
    if not batched:
        assert unet.batches == [1] * 4 + [3] * 4 + [2] * 4 + [1] * 4
    elif vector is None:  # the prompts alone tell the halves apart
        assert unet.batches == [1, 1, 3, 3, 2, 2, 1, 1]
    else:
        assert unet.batches == [2, 2, 6, 6, 4, 4, 2, 2]


def test_without_guidance() -> None:
    unet = Product()
    predict = Predictor(unet, Conditioning(prompt(3, 0.5), None), 0.0, True, None)
    latents = torch.ones(2, 4, 2, 2)
    assert torch.equal(predict(latents, torch.tensor(5.0)), 35.5 * latents)
    assert unet.batches == [2]


def test_an_inpainting_checkpoint_sees_its_extra_channels() -> None:
    unet = Product()
    extra = torch.full((2, 5, 2, 2), 2.0)
    predict = Predictor(unet, Conditioning(prompt(3, None), prompt(1, None)), 2.0, True, extra)
    prediction = predict(torch.ones(2, 4, 2, 2), torch.tensor(0.0))
    assert prediction.shape == (2, 9, 2, 2)
    assert torch.equal(prediction[:, 4:], torch.full((2, 5, 2, 2), 2.0 * (10 + 2 * 20)))
