"""Every naming scheme that Stable Diffusion checkpoints come in, mapped to one: the original (LDM) names.

A canonical name is ``PREFIX + module path``, with the prefixes below. Single-file checkpoints and most GGUF
files have these names already, up to a prefix; diffusers' names are translated by tables of module paths that
follow from the model's configuration.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from gguf_sd.config import SD15, SDXL, ControlConfig, UNetConfig, VAEConfig

UNET = "model.diffusion_model."
VAE = "first_stage_model."
ENCODER = ("encoder.", "quant_conv.")  # behind it: of what only encodes
TEXT = "cond_stage_model.transformer."
XL_TEXT = ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model.")
CONTROL = "control_model."
SAFETY = "safety_checker."  # behind it: the names of diffusers' checkpoints, as transformers 4 wrote them

# OpenCLIP's names of what transformers calls otherwise; attention's queries, keys and values are one tensor there.
OPENCLIP = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
OPENCLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}

# Prefixes that tools write instead (stable-diffusion.cpp, ComfyUI exports), longest first within a family.
PREFIX_ALIASES = {
    "unet.": UNET,
    "vae.": VAE,
    "te.text_model.": TEXT + "text_model.",
    "te.": TEXT,
}
# The text encoders of SDXL under stable-diffusion.cpp's names.
XL_PREFIX_ALIASES = {
    "cond_stage_model.1.": "conditioner.embedders.1.",
    "cond_stage_model.": "conditioner.embedders.0.",
}

# Tensors of single-file checkpoints that are no weights of the model at inference.
IGNORED = re.compile(
    r"(model_ema\.(decay|num_updates)|betas|alphas_cumprod.*|sqrt_.*|log_one_minus_.*|posterior_.*|lvlb_weights"
    r"|.*\.position_ids|logvar|scale_factor|denoiser\.sigmas|first_stage_model\.loss\..*|optimizer.*"
    r"|cond_stage_model\.logit_scale|conditioner\.embedders\.1\.model\.logit_scale)"
)

# What only a UNet under diffusers' names has; a ControlNet has the first, but no way up.
DIFFUSERS_UNET = re.compile(r"(.*\.)?time_embedding\.linear_1\.weight")

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_TOP = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_VAE_TOP = {
    "encoder.conv_in": "encoder.conv_in",
    "encoder.conv_norm_out": "encoder.norm_out",
    "encoder.conv_out": "encoder.conv_out",
    "decoder.conv_in": "decoder.conv_in",
    "decoder.conv_norm_out": "decoder.norm_out",
    "decoder.conv_out": "decoder.conv_out",
    "quant_conv": "quant_conv",
    "post_quant_conv": "post_quant_conv",
}
_VAE_RESNET = {
    "norm1": "norm1",
    "conv1": "conv1",
    "norm2": "norm2",
    "conv2": "conv2",
    "conv_shortcut": "nin_shortcut",
}
_VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
_VAE_ATTENTION_OLD = {"query": "q", "key": "k", "value": "v", "proj_attn": "proj_out"}  # diffusers < 0.12


def _join(prefix: str, new_prefix: str, leaves: Mapping[str, str]) -> dict[str, str]:
    return {f"{prefix}.{old}": f"{new_prefix}.{new}" for old, new in leaves.items()}


def unet_modules(config: UNetConfig) -> dict[str, str]:
    """diffusers' module paths of the UNet -> LDM's. Transformer blocks have the same inner names in both."""
    paths = dict(_UNET_TOP)
    levels, layers = len(config.block_out_channels), config.layers_per_block

    def resnet(diffusers: str, ldm: str) -> None:
        paths.update(_join(diffusers, ldm, _RESNET))

    for level in range(levels):
        first = level * (layers + 1) + 1
        for j in range(layers):
            resnet(f"down_blocks.{level}.resnets.{j}", f"input_blocks.{first + j}.0")
            paths[f"down_blocks.{level}.attentions.{j}"] = f"input_blocks.{first + j}.1"
        paths[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{first + layers}.0.op"

        up = levels - 1 - level  # diffusers counts the way up from the lowest resolution
        upsampler = 2 if config.transformer_layers[level] else 1
        for j in range(layers + 1):
            block = up * (layers + 1) + j
            resnet(f"up_blocks.{up}.resnets.{j}", f"output_blocks.{block}.0")
            paths[f"up_blocks.{up}.attentions.{j}"] = f"output_blocks.{block}.1"
        paths[f"up_blocks.{up}.upsamplers.0.conv"] = f"output_blocks.{up * (layers + 1) + layers}.{upsampler}.conv"
    resnet("mid_block.resnets.0", "middle_block.0")
    paths["mid_block.attentions.0"] = "middle_block.1"
    resnet("mid_block.resnets.1", "middle_block.2")
    return paths


def control_modules(config: ControlConfig) -> dict[str, str]:
    """diffusers' module paths of a ControlNet -> LDM's."""
    paths = {old: new for old, new in unet_modules(config.unet).items() if not old.startswith("up_blocks.")}
    hint, blocks = "controlnet_cond_embedding", 2 * (len(config.hint_channels) - 1)
    paths |= {f"{hint}.conv_in": "input_hint_block.0"}
    paths |= {f"{hint}.blocks.{i}": f"input_hint_block.{2 * i + 2}" for i in range(blocks)}
    paths |= {f"{hint}.conv_out": f"input_hint_block.{2 * blocks + 2}"}
    levels, layers = len(config.unet.block_out_channels), config.unet.layers_per_block
    skips = levels * (layers + 1)
    paths |= {f"controlnet_down_blocks.{i}": f"zero_convs.{i}.0" for i in range(skips)}
    return paths | {"controlnet_mid_block": "middle_block_out.0"}


def vae_modules(config: VAEConfig) -> dict[str, str]:
    """diffusers' module paths of the autoencoder -> LDM's."""
    paths = dict(_VAE_TOP)
    levels, layers = len(config.block_out_channels), config.layers_per_block
    for level in range(levels):
        for j in range(layers):
            paths |= _join(f"encoder.down_blocks.{level}.resnets.{j}", f"encoder.down.{level}.block.{j}", _VAE_RESNET)
        paths[f"encoder.down_blocks.{level}.downsamplers.0.conv"] = f"encoder.down.{level}.downsample.conv"
        up = levels - 1 - level
        for j in range(layers + 1):
            paths |= _join(f"decoder.up_blocks.{level}.resnets.{j}", f"decoder.up.{up}.block.{j}", _VAE_RESNET)
        paths[f"decoder.up_blocks.{level}.upsamplers.0.conv"] = f"decoder.up.{up}.upsample.conv"
    for part in ("encoder", "decoder"):
        for i in (0, 1):
            paths |= _join(f"{part}.mid_block.resnets.{i}", f"{part}.mid.block_{i + 1}", _VAE_RESNET)
        # Old names first, so that inverting the table gives today's names.
        paths |= _join(f"{part}.mid_block.attentions.0", f"{part}.mid.attn_1", _VAE_ATTENTION_OLD)
        paths |= _join(f"{part}.mid_block.attentions.0", f"{part}.mid.attn_1", _VAE_ATTENTION)
    return paths


def rename(name: str, modules: Mapping[str, str]) -> str | None:
    """The tensor ``name`` with its longest known module path replaced; None where no path fits."""
    parts = name.split(".")
    for n in range(len(parts) - 1, 0, -1):
        if (new := modules.get(".".join(parts[:n]))) is not None:
            return ".".join([new, *parts[n:]])
    return None


def inverted(modules: Mapping[str, str]) -> dict[str, str]:
    """The same table from LDM's names to diffusers'."""
    return {new: old for old, new in modules.items()}


def canonical_names(names: Iterable[str], unet: UNetConfig | None = None) -> dict[str, str]:
    """Canonical name -> name in the file, for single-file checkpoints and the GGUF files of other tools.

    Known prefixes are replaced, bare UNet files (no prefix at all) get theirs, a UNet under diffusers' names (``unet``
    is its configuration; None: SD 1.x's or SDXL's, whichever has such names) and VAE attention under them their
    original ones. Tensors that inference does not use are left out; unknown ones are kept as they are, for the loader
    to name.
    """
    names = list(names)
    bare = "input_blocks.0.0.weight" in names
    xl = any("label_emb.0.0.weight" in name for name in names)
    aliases = PREFIX_ALIASES | (XL_PREFIX_ALIASES if xl else {})
    translated = _from_diffusers(names, unet)
    result: dict[str, str] = {}
    for name in names:
        new = translated.get(name) or (UNET + name if bare else name)
        for alias, prefix in aliases.items():
            if new.startswith(alias):
                new = prefix + new.removeprefix(alias)
                break
        new = _canonical_vae_attention(new)
        if not IGNORED.fullmatch(new):
            result[new] = name
    return result


def _from_diffusers(names: list[str], config: UNetConfig | None) -> dict[str, str]:
    """Canonical names of the tensors of a UNet that has diffusers' names, whatever stands before them."""
    found = next((match for name in names if (match := DIFFUSERS_UNET.fullmatch(name))), None)
    if found is None or not any(".up_blocks." in f".{name}" for name in names):
        return {}
    prefix = found[1] or ""
    if config is None:
        config = (SDXL if f"{prefix}add_embedding.linear_1.weight" in names else SD15).unet
    modules = unet_modules(config)
    own = (name for name in names if name.startswith(prefix))
    return {name: UNET + new for name in own if (new := rename(name.removeprefix(prefix), modules))}


def _canonical_vae_attention(name: str) -> str:
    head, marker, tail = name.partition(".mid.attn_1.")
    if not marker or not head.startswith(VAE):
        return name
    leaf, _, kind = tail.rpartition(".")
    leaf = (_VAE_ATTENTION_OLD | _VAE_ATTENTION).get(leaf, leaf)
    return f"{head}{marker}{leaf}.{kind}"
