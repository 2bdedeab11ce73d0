"""Tiny random Stable Diffusion pipelines, made by diffusers: the material and the oracle of most tests."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run on CPU tensors; read when triton is imported, which is later

UNET = {
    "sample_size": 16,
    "block_out_channels": (32, 64),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
VAE = {
    "block_out_channels": (32, 32, 64, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "latent_channels": 4,
}
XL_UNET = UNET | {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2),
    "attention_head_dim": (2, 4),
    "use_linear_projection": True,
    "cross_attention_dim": 64,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 32 + 6 * 256,
}


@dataclass
class Tiny:
    """What a tiny pipeline differs in from the one above."""

    xl: bool = False
    unet: dict[str, Any] = field(default_factory=dict)
    vae: dict[str, Any] = field(default_factory=dict)
    scheduler: str = "PNDMScheduler"
    scheduler_config: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    safety: bool = False


def randomise(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Fresh values for every parameter, norms and biases too, so that no mix-up of two of them goes unseen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
            else:
                parameter.copy_(0.1 * noise + (1.0 if name.endswith("weight") else 0.0))
    return module.eval()


def write_tokenizer(folder: Path) -> None:
    """A CLIP tokenizer of 512 byte symbols and a few merges."""
    symbols = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merges = [("c", "a"), ("ca", "t</w>"), ("r", "e"), ("re", "d</w>"), ("d", "o"), ("do", "g</w>")]
    vocabulary = [*symbols, *(s + "</w>" for s in symbols), *("".join(m) for m in merges)]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    start, end = "<|startoftext|>", "<|endoftext|>"
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}
    config |= {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function from the fields of Tiny to the folder of a saved StableDiffusionPipeline; the same call, the same
    folder."""
    made: dict[str, Path] = {}

    def make(**fields: Any) -> Path:
        key = json.dumps(fields, sort_keys=True)
        if key not in made:
            made[key] = save_pipeline(Tiny(**fields), tmp_path_factory.mktemp("tiny"))
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_model(tiny_pipeline: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That pipeline as a GGUF file in Q8_0, for tests that only read it."""
    from gguf_sd_convert.convert import ConvertOptions, convert

    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    convert(tiny_pipeline(), path, ConvertOptions(type="q8_0"))
    return path


def save_pipeline(tiny: Tiny, folder: Path) -> Path:
    import diffusers
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizerFast

    write_tokenizer(folder / "tokenizer")
    tokenizer = CLIPTokenizerFast.from_pretrained(folder / "tokenizer")  # which writes tokenizer.json, too
    scheduler = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
    if tiny.scheduler == "PNDMScheduler":
        scheduler |= {"skip_prk_steps": True}
    base = XL_UNET if tiny.xl else UNET
    parts: dict[str, Any] = {
        "vae": randomise(diffusers.AutoencoderKL(**(VAE | tiny.vae)), tiny.seed),
        "text_encoder": randomise(CLIPTextModel(_text_config(tokenizer)), tiny.seed + 1),
        "tokenizer": tokenizer,
        "unet": randomise(diffusers.UNet2DConditionModel(**(base | tiny.unet)), tiny.seed + 2),
        "scheduler": getattr(diffusers, tiny.scheduler)(**(scheduler | tiny.scheduler_config)),
    }
    if tiny.xl:
        second = CLIPTextModelWithProjection(_text_config(tokenizer, hidden_act="gelu", num_hidden_layers=3))
        parts |= {"text_encoder_2": randomise(second, tiny.seed + 3), "tokenizer_2": tokenizer}
        diffusers.StableDiffusionXLPipeline(**parts).save_pretrained(folder)
    else:
        checker, processor = _safety_checker(tiny.seed + 4) if tiny.safety else (None, None)
        parts |= {"safety_checker": checker, "feature_extractor": processor, "requires_safety_checker": tiny.safety}
        diffusers.StableDiffusionPipeline(**parts).save_pretrained(folder)
    return folder


def _safety_checker(seed: int) -> tuple[Any, Any]:
    """A checker with random concepts, and its image processor, which looks at less than the whole picture."""
    import transformers
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    pil = "CLIPImageProcessorPil" if hasattr(transformers, "CLIPImageProcessorPil") else "CLIPImageProcessor"
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision |= {"image_size": 32, "patch_size": 8}
    checker = StableDiffusionSafetyChecker(transformers.CLIPConfig(vision_config=vision, projection_dim=24))
    processor = getattr(transformers, pil)(size={"shortest_edge": 37}, crop_size={"height": 32, "width": 32})
    return randomise(checker, seed), processor


def _text_config(tokenizer: Any, **changes: Any) -> Any:
    from transformers import CLIPTextConfig

    config = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return CLIPTextConfig(vocab_size=len(tokenizer), projection_dim=32, **(config | ids | changes))
