"""The tensors that a model consists of: canonical names and the shapes they have in original checkpoints."""

from __future__ import annotations

import torch
from torch import nn

from gguf_sd.checkpoint.tensor_names import SAFETY, TEXT, UNET, VAE, XL_TEXT
from gguf_sd.config import ModelConfig, SafetyConfig, TextConfig
from gguf_sd.models.layers import Pointwise
from gguf_sd.models.unet import SpatialTransformer, UNet
from gguf_sd.models.vae import AttnBlock, Autoencoder

Shape = tuple[int, ...]


def expected_tensors(config: ModelConfig) -> dict[str, Shape]:
    """Canonical name -> shape in torch order; UNet, autoencoder, text encoders, safety checker, in this order."""
    with torch.device("meta"):
        unet, vae = UNet(config.unet), Autoencoder(config.vae)
    shapes = _module_shapes(unet, UNET, {SpatialTransformer} if not config.unet.linear_projection else set())
    shapes |= _module_shapes(vae, VAE, {AttnBlock})
    if config.name == "sdxl":
        clip, openclip = config.text
        shapes |= {XL_TEXT[0] + name: shape for name, shape in clip_shapes(clip).items()}
        shapes |= {XL_TEXT[1] + name: shape for name, shape in openclip_shapes(openclip).items()}
    else:
        shapes |= {TEXT + name: shape for name, shape in clip_shapes(config.text[0]).items()}
    if config.safety:
        shapes |= {SAFETY + name: shape for name, shape in safety_shapes(config.safety).items()}
    return shapes


def _module_shapes(model: nn.Module, prefix: str, pointwise_owners: set[type[nn.Module]]) -> dict[str, Shape]:
    """Linears that original checkpoints hold as 1x1 convolutions, [out, in, 1, 1], get that shape: the engine's
    Pointwise layers, and the immediate linears of ``pointwise_owners``."""
    pointwise = {name for name, module in model.named_modules() if isinstance(module, Pointwise)}
    for name, module in model.named_modules():
        if type(module) in pointwise_owners:
            pointwise |= {f"{name}.{leaf}" for leaf, child in module.named_children() if isinstance(child, nn.Linear)}
    shapes = {}
    for name, tensor in model.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        tail = (1, 1) if owner in pointwise and leaf == "weight" else ()
        shapes[prefix + name] = (*tensor.shape, *tail)
    return shapes


def clip_shapes(config: TextConfig) -> dict[str, Shape]:
    """transformers' CLIPTextModel, names as in its version 4."""
    width, inner = config.hidden_size, config.intermediate_size
    shapes: dict[str, Shape] = {
        "embeddings.token_embedding.weight": (config.vocab_size, width),
        "embeddings.position_embedding.weight": (config.max_position_embeddings, width),
    }
    shapes |= _clip_layers(config.num_hidden_layers, width, inner)
    shapes |= {f"final_layer_norm.{leaf}": (width,) for leaf in ("weight", "bias")}
    return {"text_model." + name: shape for name, shape in shapes.items()}


def _clip_layers(layers: int, width: int, inner: int) -> dict[str, Shape]:
    """The transformer layers of transformers' CLIP models, text and vision alike."""
    shapes: dict[str, Shape] = {}
    linears = {f"self_attn.{leaf}": (width, width) for leaf in ("k_proj", "v_proj", "q_proj", "out_proj")}
    linears |= {"mlp.fc1": (inner, width), "mlp.fc2": (width, inner)}
    for i in range(layers):
        for name, shape in linears.items():
            shapes[f"encoder.layers.{i}.{name}.weight"] = shape
            shapes[f"encoder.layers.{i}.{name}.bias"] = shape[:1]
        for norm in ("layer_norm1", "layer_norm2"):
            shapes |= {f"encoder.layers.{i}.{norm}.{leaf}": (width,) for leaf in ("weight", "bias")}
    return shapes


def safety_shapes(config: SafetyConfig) -> dict[str, Shape]:
    """diffusers' StableDiffusionSafetyChecker, names as transformers 4 gives them."""
    width, patches = config.hidden_size, (config.image_size // config.patch_size) ** 2
    vision: dict[str, Shape] = {
        "embeddings.class_embedding": (width,),
        "embeddings.patch_embedding.weight": (width, 3, config.patch_size, config.patch_size),
        "embeddings.position_embedding.weight": (patches + 1, width),
    }
    vision |= {f"pre_layrnorm.{leaf}": (width,) for leaf in ("weight", "bias")}
    vision |= _clip_layers(config.num_hidden_layers, width, config.intermediate_size)
    vision |= {f"post_layernorm.{leaf}": (width,) for leaf in ("weight", "bias")}
    shapes = {"vision_model.vision_model." + name: shape for name, shape in vision.items()}
    shapes["visual_projection.weight"] = (config.projection_dim, width)
    for name, count in (("concept", config.concepts), ("special_care", config.special_care)):
        shapes |= {f"{name}_embeds": (count, config.projection_dim), f"{name}_embeds_weights": (count,)}
    return shapes


def openclip_shapes(config: TextConfig) -> dict[str, Shape]:
    """OpenCLIP's text transformer. Its ``text_projection`` is [in, out]."""
    width, inner = config.hidden_size, config.intermediate_size
    shapes: dict[str, Shape] = {
        "token_embedding.weight": (config.vocab_size, width),
        "positional_embedding": (config.max_position_embeddings, width),
        "text_projection": (width, config.projection_dim),
        "ln_final.weight": (width,),
        "ln_final.bias": (width,),
    }
    layer: dict[str, Shape] = {"attn.in_proj_weight": (3 * width, width), "attn.in_proj_bias": (3 * width,)}
    for name, rows, cols in (("attn.out_proj", width, width), ("mlp.c_fc", inner, width), ("mlp.c_proj", width, inner)):
        layer |= {f"{name}.weight": (rows, cols), f"{name}.bias": (rows,)}
    layer |= {f"{norm}.{leaf}": (width,) for norm in ("ln_1", "ln_2") for leaf in ("weight", "bias")}
    for i in range(config.num_hidden_layers):
        shapes |= {f"transformer.resblocks.{i}.{name}": shape for name, shape in layer.items()}
    return shapes
