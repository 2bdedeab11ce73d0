"""Our UNet and autoencoder against diffusers', same weights, float32."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from gguf_sd.checkpoint.assign import assign
from gguf_sd.checkpoint.tensor_names import rename, unet_modules, vae_modules
from gguf_sd.config import UNetConfig, VAEConfig
from gguf_sd.errors import GgufSdError
from gguf_sd.models.unet import UNet
from gguf_sd.models.vae import Autoencoder

BASE = UNetConfig(
    block_out_channels=(32, 64),
    transformer_layers=(1, 0),
    num_heads=(4, 4),
    context_dim=32,
    norm_groups=8,
)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sd1": ({}, {}),
    "inpainting": ({"in_channels": 9}, {"in_channels": 9}),
    "linear projection": ({"use_linear_projection": True}, {"linear_projection": True}),
    "one layer a block": ({"layers_per_block": 1}, {"layers_per_block": 1}),
    "three levels, two blocks deep, attention low": (
        {
            "block_out_channels": (32, 64, 96),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": (2, 4, 8),
            "transformer_layers_per_block": (1, 2, 3),
        },
        {
            "block_out_channels": (32, 64, 96),
            "transformer_layers": (0, 2, 3),
            "mid_transformer_layers": 3,
            "num_heads": (2, 4, 8),
        },
    ),
}


def max_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest error, relative to the largest value."""
    return ((got - expected).abs().max() / expected.abs().max()).item()


def load(model: torch.nn.Module, oracle: torch.nn.Module, modules: dict[str, str]) -> torch.nn.Module:
    renamed = {rename(name, modules): value for name, value in oracle.state_dict().items()}
    assert None not in renamed
    assign(model, {str(k): partial(lambda v: v, v) for k, v in renamed.items()}, torch.float32, "the oracle")
    return model.eval()


def tiny_unet(folder: Path, **changes: Any) -> tuple[UNet, Any]:
    oracle = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
    config = UNetConfig.from_dict({**vars(BASE), **changes})
    with torch.device("meta"):
        unet = UNet(config)
    load(unet, oracle, unet_modules(config))
    return unet, oracle


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [(16, 16), (5, 7)], ids=["even", "odd"])
@torch.inference_mode()
def test_unet_equals_diffusers(tiny_pipeline: Callable[..., Path], case: str, size: tuple[int, int]) -> None:
    theirs, ours = CASES[case]
    unet, oracle = tiny_unet(tiny_pipeline(unet=theirs), **ours)
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, unet.config.in_channels, *size, generator=generator)
    context = torch.randn(2, 77, 32, generator=generator)
    timesteps = torch.tensor([981, 1])
    expected = oracle(latents, timesteps, context).sample
    assert max_error(unet(latents, timesteps, context), expected) < 1e-4
    swapped = unet(latents, timesteps.flip(0), context)
    assert max_error(swapped, expected) > 1e-2, "the timestep makes no difference: the comparison is blind"


@pytest.mark.parametrize("layers", [1, 2])
@torch.inference_mode()
def test_vae_equals_diffusers(tiny_pipeline: Callable[..., Path], layers: int) -> None:
    oracle = diffusers.AutoencoderKL.from_pretrained(tiny_pipeline(vae={"layers_per_block": layers}) / "vae")
    config = VAEConfig(block_out_channels=(32, 32, 64, 64), layers_per_block=layers, norm_groups=8)
    with torch.device("meta"):
        vae = Autoencoder(config)
    load(vae, oracle, vae_modules(config))
    images = torch.rand(2, 3, 64, 48, generator=torch.Generator().manual_seed(2)) * 2 - 1
    expected = oracle.encode(images).latent_dist
    mean, std = vae.encode(images)
    assert max_error(mean, expected.mean) < 1e-4
    assert max_error(std, expected.std) < 1e-4
    decoded = oracle.decode(expected.mean).sample
    assert max_error(vae.decode(expected.mean * config.scaling_factor), decoded) < 1e-4


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s.pop("out.2.weight"), "lacks 1 of .* the first is out.2.weight"),
        (lambda s: s.update({"out.2.bias": lambda: torch.zeros(3)}), r"out.2.bias has shape \[3\] .* takes \[4\]"),
    ],
)
def test_assign_is_strict(damage: Callable[[dict[str, Any]], None], message: str) -> None:
    unet = UNet(BASE)
    sources = {name: partial(lambda v: v, value) for name, value in unet.state_dict().items()}
    damage(sources)
    with pytest.raises(GgufSdError, match=f"model.gguf.*{message}"):
        assign(UNet(BASE), sources, torch.float32, "model.gguf")


def test_assign_names_what_does_not_belong(caplog: pytest.LogCaptureFixture) -> None:
    sources = {name: partial(lambda v: v, value) for name, value in UNet(BASE).state_dict().items()}
    assign(UNet(BASE), sources | {"extra": lambda: torch.zeros(1)}, torch.float32, "model.gguf")
    assert "model.gguf holds a tensor that does not belong and is left out: extra" in caplog.text
