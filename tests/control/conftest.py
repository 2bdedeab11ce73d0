"""Tiny random ControlNets, made by diffusers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest

from gguf_sd_convert.convert import ConvertOptions, convert
from tests.conftest import UNET, XL_UNET, randomise

SHARED = ("block_out_channels", "layers_per_block", "down_block_types", "cross_attention_dim", "norm_num_groups",
          "attention_head_dim", "transformer_layers_per_block", "use_linear_projection", "addition_embed_type",
          "addition_time_embed_dim", "projection_class_embeddings_input_dim")  # fmt: skip


@pytest.fixture(scope="session")
def tiny_control(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function from ``xl``, a seed and settings to the folder of a saved ControlNetModel for tiny_pipeline's models;
    the same call, the same folder."""
    made: dict[str, Path] = {}

    def make(xl: bool = False, seed: int = 9, **settings: Any) -> Path:
        key = repr((xl, seed, sorted(settings.items())))
        if key not in made:
            base = XL_UNET if xl else UNET
            known = {name: base[name] for name in SHARED if name in base}
            known |= {"conditioning_embedding_out_channels": (8, 8, 16, 16)} | settings
            made[key] = tmp_path_factory.mktemp("control") / "control"
            net: Any = randomise(diffusers.ControlNetModel(**known), seed)
            for weight in (p for p in net.controlnet_cond_embedding.parameters() if p.dim() > 1):
                weight.data *= 2.5  # a picture that counts
            net.save_pretrained(made[key])
        return made[key]

    return make


@pytest.fixture(scope="session")
def gguf_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function from a source and a type to the converted file; the same call, the same file."""
    made: dict[tuple[Path, str], Path] = {}

    def make(source: Path, type: str = "q4_0") -> Path:
        if (source, type) not in made:
            made[source, type] = tmp_path_factory.mktemp("gguf") / f"{source.name}.gguf"
            convert(source, made[source, type], ConvertOptions(type=type))
        return made[source, type]

    return make
