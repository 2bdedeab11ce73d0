"""What a weight file is that is no Stable Diffusion model, told from the names and shapes of its tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

Shapes = Mapping[str, Sequence[int]]


class Kind(NamedTuple):
    """``name`` goes behind "FILE is", ``advice`` is what to do with it; ``part``: unet, vae or text, of what is a part
    of a model."""

    name: str
    advice: str
    part: str = ""


MODELS = "gguf-sd takes Stable Diffusion 1.x and XL"
WHOLE = "a whole model is needed: UNet, autoencoder and text encoder in one checkpoint, or a diffusers folder"
LORA = Kind("a LoRA", "give it to generate or convert as --lora, beside the model that it was made for")
CONTROLNET = Kind("a ControlNet", "give it to generate as --control, with --control-image, beside a model")
OTHER_CONTROL = Kind("a T2I-Adapter, ControlNet-LLLite or Control-LoRA", "gguf-sd runs ControlNets proper instead")
EMBEDDING = Kind("a textual-inversion embedding", "give it to generate as --embedding, beside a model")
TINY_VAE = Kind("a tiny autoencoder (TAESD)", "give it to generate as --vae, beside a model")
VAE = Kind("a VAE alone", "give it to generate or pack as --vae, beside a model", "vae")

LORA_NAME = re.compile(
    r"(^|\.)lora_(unet|te\d?|transformer)_|[._]lora[._](A|B|a|b|down|up)([._]|$)|\.(hada_w1_a|lokr_w1|oft_blocks|diff)$"
)
CONTROLNET_NAME = re.compile(
    r"^(control_model|controlnet_cond_embedding|controlnet_down_blocks|input_hint_block|zero_convs)[._]"
)
OTHER_CONTROL_NAME = re.compile(r"^(lllite_unet|adapter\.body|lora_controlnet)([._]|$)")
EMBEDDING_WIDTHS = (768, 1024, 1280)
EMBEDDING_NAME = re.compile(r"emb_params|clip_[lg]|<[^>]*>|\*|string_to_param\..*|[^.]*")
UNET_ADVICE = "give it to generate or pack with {} and --vae, or to convert with --unet-only"
# Widths of text encoders' tokens, what they are called, and what to do with them.
TEXT_ENCODERS = {
    768: Kind(
        "a text encoder alone (CLIP-L)",
        "give it to generate or pack as --clip-l, beside a UNet of SD 1.x or SDXL",
        "text",
    ),
    1280: Kind(
        "a text encoder alone (CLIP-G)", "give it to generate or pack as --clip-g, beside a UNet of SDXL", "text"
    ),
    1024: Kind("a text encoder alone (OpenCLIP ViT-H, of Stable Diffusion 2)", MODELS),
}
TEXT_ENCODER = Kind(
    "a text encoder alone", "give it to generate or pack as --clip-l or --clip-g, beside a UNet made for it", "text"
)
TINY_NAME = re.compile(
    r"((encoder|decoder)\.(layers\.)?)?[0-9]{1,3}\.(weight|bias|(conv|skip)(\.[0-9])?\.(weight|bias))"
)
# Tensors that give another architecture away, by the end of their names.
FOREIGN = {
    "double_blocks.0.img_attn.qkv.weight": "Flux",
    "single_transformer_blocks.0.proj_mlp.weight": "Flux",
    "double_blocks.0.img_attn_qkv.weight": "HunyuanVideo",
    "joint_blocks.0.x_block.attn.qkv.weight": "Stable Diffusion 3",
    "transformer_blocks.0.attn.add_q_proj.weight": "Stable Diffusion 3 or a like transformer",
    "transformer_blocks.0.img_mod.1.weight": "Qwen-Image",
    "adaln_single.linear.weight": "PixArt or LTX-Video",
    "down_blocks.0.motion_modules.0.proj_in.weight": "an AnimateDiff motion module",
    "blocks.0.cross_attn.q.weight": "a video or DiT model",
    "effnet_mapper.0.weight": "Stable Cascade",
    "model.embed_tokens.weight": "a language model",
    "model.layers.0.self_attn.q_proj.weight": "a language model",
    "transformer.h.0.attn.c_attn.weight": "a language model",
    "token_embd.weight": "a language model",
    "blk.0.attn_q.weight": "a language model",
    "encoder.block.0.layer.0.SelfAttention.q.weight": "T5, a text encoder",
    "model.1.sub.0.RDB1.conv1.0.weight": "an upscaler",
    "body.0.rdb1.conv1.weight": "an upscaler",
}
XL_VECTOR = ("label_emb.0.0.weight", "add_embedding.linear_1.weight")
PARTS = {  # the part of Stable Diffusion that tensors belong to, under the original and diffusers' names
    "unet": re.compile(r"(model\.diffusion_model\.|unet\.)?(input_blocks\.0\.0\.|time_embedding\.linear_1\.)"),
    "vae": re.compile(r"(first_stage_model\.|vae\.)?(encoder|decoder)\.(conv_in\.|mid\.|mid_block\.)"),
    "text": re.compile(
        r"(cond_stage_model|conditioner\.embedders|te|text_encoders|clip_[lg])\.|(text_model\.)?(encoder\.layers|embeddings\.token_embedding)\."
        r"|(model\.)?transformer\.resblocks\."
    ),
}


def what_is(shapes: Shapes) -> Kind | None:
    """What tensors of these names and shapes are; None for a whole Stable Diffusion model, and for what is not known.
    Names may be canonical or as they stand in the file."""
    parts = {part for part, pattern in PARTS.items() if any(pattern.match(name) for name in shapes)}
    if len(parts) == len(PARTS):
        return None  # whatever else there is
    if any(OTHER_CONTROL_NAME.match(name) for name in shapes):
        return OTHER_CONTROL
    if any(LORA_NAME.search(name) for name in shapes):
        return LORA
    if any(CONTROLNET_NAME.match(name) for name in shapes):
        return CONTROLNET
    if (foreign := _foreign(shapes)) is not None:
        return foreign
    if _is_embedding(shapes):
        return EMBEDDING
    if shapes and all(TINY_NAME.fullmatch(name) for name in shapes):
        return TINY_VAE
    return _part(parts.pop(), shapes) if len(parts) == 1 else None


def _part(part: str, shapes: Shapes) -> Kind:
    if part == "vae":
        return VAE
    if part == "unet":
        xl = any(name.endswith(XL_VECTOR) for name in shapes)
        return Kind("a UNet alone", UNET_ADVICE.format("--clip-l, --clip-g" if xl else "--clip-l"), "unet")
    widths = [shape[-1] for name, shape in shapes.items() if name.endswith("token_embedding.weight") and shape]
    return TEXT_ENCODERS.get(widths[0], TEXT_ENCODER) if len(widths) == 1 else TEXT_ENCODER


def _foreign(names: Iterable[str]) -> Kind | None:
    for name in names:
        for tail, what in FOREIGN.items():
            if name == tail or name.endswith("." + tail):
                return Kind(f"a checkpoint of {what}", MODELS)
    return None


def _is_embedding(shapes: Shapes) -> bool:
    """One vector, or a few, a text encoder."""
    vectors = all(1 <= len(shape) <= 2 and shape[-1] in EMBEDDING_WIDTHS for shape in shapes.values())
    return 1 <= len(shapes) <= 2 and vectors and all(EMBEDDING_NAME.fullmatch(name) for name in shapes)
