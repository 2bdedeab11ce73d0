"""The JSON files of a diffusers folder -> ModelConfig. Settings that the engine does not have are refused by name."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from gguf_sd.config import ControlConfig, Defaults, ModelConfig, TextConfig, UNetConfig, VAEConfig
from gguf_sd.errors import GgufSdError
from gguf_sd_convert.sources.json_settings import boolean, check_fixed, integer, integers, read_json, refusal
from gguf_sd_convert.sources.safety_config import safety_config
from gguf_sd_convert.sources.scheduler_config import scheduler_config

# Settings that must have one of these values, the first of which is diffusers' default for an absent key.
UNET_FIXED: dict[str, tuple[Any, ...]] = {
    "_class_name": ("UNet2DConditionModel",),
    "center_input_sample": (False,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "only_cross_attention": (False,),
    "mid_block_only_cross_attention": (None, False),
    "downsample_padding": (1,),
    "mid_block_scale_factor": (1,),
    "act_fn": ("silu", "swish"),
    "norm_eps": (1e-5,),
    "reverse_transformer_layers_per_block": (None,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "dual_cross_attention": (False,),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "addition_embed_type": (None, "text_time"),
    "num_attention_heads": (None,),
    "resnet_time_scale_shift": ("default",),
    "resnet_skip_time_act": (False,),
    "resnet_out_scale_factor": (1.0,),
    "time_embedding_type": ("positional",),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
    "time_cond_proj_dim": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "attention_type": ("default",),
    "class_embeddings_concat": (False,),
    "cross_attention_norm": (None,),
}
CONTROL_FIXED: dict[str, tuple[Any, ...]] = UNET_FIXED | {
    "_class_name": ("ControlNetModel",),
    "controlnet_conditioning_channel_order": ("rgb",),
    "global_pool_conditions": (False,),
}
VAE_FIXED: dict[str, tuple[Any, ...]] = {
    "_class_name": ("AutoencoderKL",),
    "act_fn": ("silu", "swish"),
    "shift_factor": (None,),
    "latents_mean": (None,),
    "latents_std": (None,),
    "use_quant_conv": (True,),
    "use_post_quant_conv": (True,),
    "mid_block_add_attention": (True,),
}
MAX_LEVELS = 8  # of a UNet or an autoencoder
TEXT_FIXED: dict[str, tuple[Any, ...]] = {"layer_norm_eps": (1e-5,)}


def read_model_config(folder: Path, safety: bool = True) -> tuple[ModelConfig, list[str]]:
    """The model that a diffusers folder describes, with its safety checker unless ``safety`` is false, and notes on
    what was not taken over.

    Token ids are where CLIP has them, at the end of the vocabulary; those of the tokenizer take their place
    (:mod:`gguf_sd_convert.convert`).
    Raises GgufSdError, naming file, setting and value, for models that the engine cannot run.
    """
    unet_json = read_json(folder / "unet" / "config.json")
    vae_json = read_json(folder / "vae" / "config.json")
    unet, vae = _unet(unet_json), _vae(vae_json)
    texts = [_text(folder / "text_encoder" / "config.json")]
    if (folder / "text_encoder_2").is_dir():
        texts.append(_text(folder / "text_encoder_2" / "config.json", projected=True))
    name = "sdxl" if len(texts) == 2 else "sd1"
    _check_fit(folder, unet, vae, texts)
    scheduler, defaults, notes = scheduler_config(read_json(folder / "scheduler" / "scheduler_config.json"), name)
    width, height = _size(unet_json, vae)
    index = read_json(folder / "model_index.json")
    defaults = _own_defaults(index, replace(defaults, width=width, height=height))
    if name == "sdxl":
        vae = replace(vae, overflows_float16=boolean(vae_json, "force_upcast", True))
    zero = name == "sdxl" and boolean(index, "force_zeros_for_empty_prompt", True)
    checker, more = safety_config(folder) if safety else (None, [])
    config = ModelConfig(name, unet, vae, tuple(texts), scheduler, defaults, zero, checker)
    return checked_config(config, folder), notes + more


def control_config(path: Path) -> ControlConfig:
    """The ControlNet that a config.json of diffusers describes. Raises GgufSdError as :func:`read_model_config`."""
    values = read_json(path)
    check_fixed(values, CONTROL_FIXED)
    hints = values.get("conditioning_embedding_out_channels", (16, 32, 96, 256))
    if not isinstance(hints, list | tuple) or not 1 <= len(hints) <= MAX_LEVELS:
        raise refusal(values, "conditioning_embedding_out_channels", f"a list of up to {MAX_LEVELS} positive integers")
    mirrored = [str(kind).replace("Down", "Up") for kind in reversed(_down_blocks(values))]
    unet = _unet(values | {"_class_name": "UNet2DConditionModel", "up_block_types": mirrored})
    config = ControlConfig(
        "sdxl" if unet.vector_dim else "sd1",
        unet,
        integer(values, "conditioning_channels", 3),
        integers(values, "conditioning_embedding_out_channels", hints, len(hints)),
    )
    try:
        return ControlConfig.from_dict(asdict(config))
    except ValueError as error:
        raise GgufSdError(f"{path}: {error}") from error


def _down_blocks(values: dict[str, Any]) -> list[Any]:
    kinds = values.get("down_block_types")
    return list(kinds) if isinstance(kinds, list | tuple) else ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]


def checked_config(config: ModelConfig, where: Path) -> ModelConfig:
    """The configuration, as a file that carries it would be checked. Raises GgufSdError."""
    try:
        return ModelConfig.from_dict(asdict(config))
    except ValueError as error:
        raise GgufSdError(f"{where}: {error}") from error


def _own_defaults(index: dict[str, Any], defaults: Defaults) -> Defaults:
    """The steps and guidance that a model_index.json may give under "_gguf_sd"; diffusers has no place for them."""
    own = index.get("_gguf_sd", {})
    if not isinstance(own, dict) or not set(own) <= {"steps", "guidance"}:
        raise refusal(index, "_gguf_sd", "an object of steps and guidance")
    values = {"_path": index["_path"], "steps": defaults.steps, "guidance": defaults.guidance} | own
    guidance = values["guidance"]
    if isinstance(guidance, bool) or not isinstance(guidance, int | float) or not 0 <= guidance <= 100:
        raise refusal(values, "guidance", "a number from 0 to 100")
    return replace(defaults, steps=integer(values, "steps", None), guidance=float(guidance))


def _channels(values: dict[str, Any], default: tuple[int, ...]) -> tuple[int, ...]:
    channels = values.get("block_out_channels", default)
    if not isinstance(channels, list | tuple) or not 1 <= len(channels) <= MAX_LEVELS:
        raise refusal(values, "block_out_channels", f"a list of up to {MAX_LEVELS} positive integers")
    return integers(values, "block_out_channels", channels, len(channels))


def _texts(value: object, count: int) -> bool:
    return isinstance(value, list | tuple) and len(value) == count and all(isinstance(item, str) for item in value)


def _unet(values: dict[str, Any]) -> UNetConfig:
    check_fixed(values, UNET_FIXED)
    channels = _channels(values, (320, 640, 1280, 1280))
    levels = len(channels)
    down = values.get("down_block_types", ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"])
    up = values.get("up_block_types", ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3)
    if not _texts(down, levels) or not set(down) <= {"CrossAttnDownBlock2D", "DownBlock2D"}:
        raise refusal(values, "down_block_types", f"{levels} of CrossAttnDownBlock2D and DownBlock2D")
    mirrored = [kind.replace("Down", "Up") for kind in reversed(down)]
    if up not in (mirrored, tuple(mirrored)):
        raise refusal(values, "up_block_types", f"the mirror image of down_block_types, {mirrored}")
    depths = integers(values, "transformer_layers_per_block", 1, levels)
    # diffusers' attention_head_dim of these UNets is, for historical reasons, the number of heads.
    heads = integers(values, "attention_head_dim", 8, levels)
    if any(width % count for width, count in zip(channels, heads, strict=True)):
        raise refusal(values, "attention_head_dim", f"numbers of heads that divide {list(channels)}")
    if values.get("time_embedding_dim") not in (None, 4 * channels[0]):
        raise refusal(values, "time_embedding_dim", str(4 * channels[0]))
    vector = 0
    if values.get("addition_embed_type") == "text_time":
        if values.get("addition_time_embed_dim", 256) != 256:
            raise refusal(values, "addition_time_embed_dim", "256")
        vector = integer(values, "projection_class_embeddings_input_dim", None)
    return UNetConfig(
        in_channels=integer(values, "in_channels", 4),
        out_channels=integer(values, "out_channels", 4),
        block_out_channels=channels,
        layers_per_block=integer(values, "layers_per_block", 2, levels),
        transformer_layers=tuple(n if "Cross" in kind else 0 for n, kind in zip(depths, down, strict=True)),
        mid_transformer_layers=depths[-1],
        num_heads=heads,
        context_dim=integer(values, "cross_attention_dim", 1280, levels),
        linear_projection=boolean(values, "use_linear_projection", False),
        vector_dim=vector,
        norm_groups=integer(values, "norm_num_groups", 32),
    )


def _vae(values: dict[str, Any]) -> VAEConfig:
    check_fixed(values, VAE_FIXED)
    channels = _channels(values, (64,))
    for key, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        if values.get(key, [kind]) not in ([kind] * len(channels), (kind,) * len(channels)):
            raise refusal(values, key, f"{len(channels)} of {kind}")
    if values.get("out_channels", 3) != values.get("in_channels", 3):
        raise refusal(values, "out_channels", "the value of in_channels")
    scaling = values.get("scaling_factor", 0.18215)
    if isinstance(scaling, bool) or not isinstance(scaling, int | float) or not scaling > 0:
        raise refusal(values, "scaling_factor", "a positive number")
    return VAEConfig(
        in_channels=integer(values, "in_channels", 3),
        latent_channels=integer(values, "latent_channels", 4),
        block_out_channels=channels,
        layers_per_block=integer(values, "layers_per_block", 1),
        norm_groups=integer(values, "norm_num_groups", 32),
        scaling_factor=scaling,
    )


def _text(path: Path, projected: bool = False) -> TextConfig:
    values = read_json(path)
    check_fixed(values, TEXT_FIXED)
    wanted = "CLIPTextModelWithProjection" if projected else "CLIPTextModel"
    if values.get("architectures", [wanted]) != [wanted]:
        raise refusal(values, "architectures", repr([wanted]))
    if values.get("model_type", "clip_text_model") != "clip_text_model":
        raise refusal(values, "model_type", "'clip_text_model'")
    if (act := values.get("hidden_act", "quick_gelu")) not in ("quick_gelu", "gelu"):
        raise refusal(values, "hidden_act", "'quick_gelu' or 'gelu'")
    vocabulary = integer(values, "vocab_size", 49408)
    return TextConfig(
        vocab_size=vocabulary,
        hidden_size=integer(values, "hidden_size", 512),
        intermediate_size=integer(values, "intermediate_size", 2048),
        num_hidden_layers=integer(values, "num_hidden_layers", 12),
        num_attention_heads=integer(values, "num_attention_heads", 8),
        max_position_embeddings=integer(values, "max_position_embeddings", 77),
        hidden_act=act,
        projection_dim=integer(values, "projection_dim", 512) if projected else 0,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )


def _check_fit(folder: Path, unet: UNetConfig, vae: VAEConfig, texts: list[TextConfig]) -> None:
    latents = vae.latent_channels
    if unet.in_channels not in (latents, 2 * latents + 1) or unet.out_channels != latents:
        raise GgufSdError(
            f"{folder}: the UNet's in_channels is {unet.in_channels}, out_channels {unet.out_channels}; gguf-sd takes "
            f"{latents} and {latents}, as many as the autoencoder has, or {2 * latents + 1} in for inpainting"
        )
    if unet.context_dim != sum(text.hidden_size for text in texts):
        raise GgufSdError(
            f"{folder}: the UNet's cross_attention_dim is {unet.context_dim}, the text encoders give "
            f"{' + '.join(str(text.hidden_size) for text in texts)}"
        )
    if bool(unet.vector_dim) != (len(texts) == 2):
        raise GgufSdError(
            f"{folder}: a UNet with addition_embed_type 'text_time' and two text encoders belong together (SDXL), "
            f"this folder has {len(texts)} and the UNet does{'' if unet.vector_dim else ' not'} have it"
        )
    if unet.vector_dim and unet.vector_dim != texts[1].projection_dim + 6 * 256:
        raise GgufSdError(
            f"{folder}: the UNet's projection_class_embeddings_input_dim is {unet.vector_dim}; with a text projection "
            f"of {texts[1].projection_dim} gguf-sd takes {texts[1].projection_dim + 6 * 256}"
        )


def _size(unet_json: dict[str, Any], vae: VAEConfig) -> tuple[int, int]:
    """Width and height in pixels."""
    size: Any = unet_json.get("sample_size")
    height, width = size if isinstance(size, list | tuple) and len(size) == 2 else (size, size)
    if not all(type(n) is int and n > 0 for n in (height, width)):
        return 512, 512
    return width * vae.downscale, height * vae.downscale
