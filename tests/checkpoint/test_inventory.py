"""The tensors that a configuration implies, computed and built."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from gguf_sd.checkpoint import inventory
from gguf_sd.checkpoint.tensor_names import UNET, VAE
from gguf_sd.config import SD15, SD15_INPAINT, SDXL, ModelConfig, SafetyConfig, TextConfig
from gguf_sd.models.layers import Pointwise
from gguf_sd.models.text import TextEncoder
from gguf_sd.models.unet import UNet
from gguf_sd.models.unet_blocks import SpatialTransformer
from gguf_sd.models.vae import AttnBlock, Autoencoder

LEVELS = {"block_out_channels": (32, 32, 64), "transformer_layers": (0, 2, 1), "num_heads": (1, 2, 4)}
TINY = replace(
    SD15,
    unet=replace(SD15.unet, layers_per_block=1, norm_groups=8, **LEVELS),
    vae=replace(SD15.vae, block_out_channels=(32, 64), layers_per_block=1),
    safety=SafetyConfig(num_hidden_layers=2),
)
FLAT = replace(
    SD15,
    unet=replace(SD15.unet, block_out_channels=(32,), transformer_layers=(1,), num_heads=(2,), linear_projection=True),
    vae=replace(SD15.vae, block_out_channels=(32,)),
)
MODELS = {"sd15": SD15, "inpainting": SD15_INPAINT, "sdxl": SDXL, "tiny": TINY, "flat": FLAT}


def built(model: nn.Module, prefix: str, owners: tuple[type[nn.Module], ...]) -> list[tuple[str, tuple[int, ...]]]:
    """A module's tensors, with the linears that original checkpoints hold as 1x1 convolutions in that shape: Pointwise
    layers, and those of ``owners``."""
    pointwise = {name for name, module in model.named_modules() if isinstance(module, Pointwise)}
    for name, module in model.named_modules():
        if isinstance(module, owners):
            pointwise |= {f"{name}.{leaf}" for leaf, child in module.named_children() if isinstance(child, nn.Linear)}
    shapes = []
    for name, tensor in model.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        tail = (1, 1) if owner in pointwise and leaf == "weight" else ()
        shapes.append((prefix + name, (*tensor.shape, *tail)))
    return shapes


@pytest.mark.parametrize("name", MODELS)
def test_arithmetic_gives_the_modules_tensors_in_their_order(name: str) -> None:
    config = MODELS[name]
    with torch.device("meta"):
        unet, vae = UNet(config.unet), Autoencoder(config.vae)
    expected = built(unet, UNET, () if config.unet.linear_projection else (SpatialTransformer,))
    expected += built(vae, VAE, (AttnBlock,))
    assert list(inventory.tensors(config))[: len(expected)] == expected


@pytest.mark.parametrize("config", [TextConfig(), SDXL.text[1]])
def test_text_encoders(config: TextConfig) -> None:
    with torch.device("meta"):
        encoder = TextEncoder(config)
    expected = {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()}
    computed = {name.removeprefix("text_model."): shape for name, shape in inventory.clip_text(config)}
    assert computed == {name.removeprefix("model.").removeprefix("text_model."): s for name, s in expected.items()}


def test_safety_checker() -> None:
    import diffusers.pipelines.stable_diffusion.safety_checker as diffusers
    from transformers import CLIPConfig

    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision |= {"image_size": 32, "patch_size": 8}
    config = SafetyConfig(**vision, projection_dim=24, resize=32)
    with torch.device("meta"):
        theirs = diffusers.StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=24))

    def bare(name: str) -> str:
        return name.replace("vision_model.", "")

    expected = {bare(name): tuple(t.shape) for name, t in theirs.state_dict().items() if "position_ids" not in name}
    assert {bare(name): shape for name, shape in inventory.safety(config)} == expected


def test_a_claim_of_millions_costs_what_is_drawn() -> None:
    config = ModelConfig(unet=replace(SD15.unet, layers_per_block=10**9))
    generator = inventory.unet(config.unet)
    assert next(generator)[0] == "time_embed.0.weight"
