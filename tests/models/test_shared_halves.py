"""What precedes the prompts in a UNet is computed once for both halves of guidance."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gguf_sd.checkpoint.model_file import ModelFile
from gguf_sd.models.unet import UNet
from gguf_sd.models.unet_blocks import Attention
from gguf_sd.sampling.guidance import Conditioning, Predictor, Prompt
from gguf_sd_convert.convert import ConvertOptions, convert


@pytest.fixture(scope="module")
def unet(tiny_pipeline: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> UNet:
    path = tmp_path_factory.mktemp("halves") / "tiny.gguf"
    convert(tiny_pipeline(), path, ConvertOptions(type="q8_0"))
    return ModelFile.open(path).load_unet(torch.float32)


def inputs(unet: UNet, pictures: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, timesteps that differ, and twice as many prompts."""
    random = torch.Generator().manual_seed(pictures)
    latents = torch.randn(pictures, unet.config.in_channels, 8, 12, generator=random)
    return (
        latents,
        torch.arange(pictures) * 100 + 7,
        torch.randn(2 * pictures, 77, unet.config.context_dim, generator=random),
    )


@pytest.mark.parametrize("pictures", [1, 3])
@pytest.mark.parametrize("controlled", [False, True])
def test_fewer_latents_than_prompts(unet: UNet, pictures: int, controlled: bool) -> None:
    latents, timesteps, context = inputs(unet, pictures)
    twice, times = torch.cat([latents, latents]), torch.cat([timesteps, timesteps])
    with torch.inference_mode():
        projected = unet.project(context)
        control: list[Tensor] = []
        if controlled:
            skips, middle = unet.down(twice, unet.embed(times, None, torch.float32), projected)
            control = [torch.full_like(x, 0.1) for x in (*skips, middle)]
        want = unet.step(twice, times, projected, control=control)
        got = unet.step(latents, timesteps, projected, control=control)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_guidance_shares_it(unet: UNet, monkeypatch: pytest.MonkeyPatch) -> None:
    """One self-attention of the step sees each picture once, all others twice."""
    latents, _, context = inputs(unet, 2)
    seen: list[int] = []
    original = Attention.forward

    def spy(self: Attention, norm: object, x: object, projected: Tensor | None = None) -> object:
        if not self.crosses:
            seen.append(len(x.rows))  # type: ignore[attr-defined]
        return original(self, norm, x, projected)  # type: ignore[arg-type]

    monkeypatch.setattr(Attention, "forward", spy)
    conditioning = Conditioning(Prompt(context[:2]), Prompt(context[2:]))
    both = Predictor(unet, conditioning, 5.0, batched=True, extra=None)(latents, torch.tensor(300))
    assert seen == [2] + [4] * (len(seen) - 1)
    apart = Predictor(unet, conditioning, 5.0, batched=False, extra=None)(latents, torch.tensor(300))
    torch.testing.assert_close(both, apart, rtol=1e-3, atol=1e-4)
