"""The tensors that a model consists of: canonical names and the shapes they have in original checkpoints.

All of it is arithmetic on the configuration, in the order of the modules; nothing is built. The generators are lazy, so
that a configuration that claims millions of tensors costs no more than the caller draws.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from gguf_sd.checkpoint.tensor_names import SAFETY, TEXT, UNET, VAE, XL_TEXT
from gguf_sd.config import ControlConfig, ModelConfig, SafetyConfig, TextConfig, UNetConfig, VAEConfig

Shape = tuple[int, ...]
Tensors = Iterator[tuple[str, Shape]]


def tensors(config: ModelConfig) -> Tensors:
    """Canonical names and shapes in torch order; UNet, autoencoder, text encoders, safety checker, in this order."""
    yield from _under(UNET, unet(config.unet))
    yield from _under(VAE, vae(config.vae))
    if config.name == "sdxl":
        clip, openclip = config.text
        yield from _under(XL_TEXT[0], clip_text(clip))
        yield from _under(XL_TEXT[1], openclip_text(openclip))
    else:
        yield from _under(TEXT, clip_text(config.text[0]))
    if config.safety:
        yield from _under(SAFETY, safety(config.safety))


def unet_tensors(config: ModelConfig) -> Tensors:
    """The UNet's alone."""
    return _under(UNET, unet(config.unet))


def expected_tensors(config: ModelConfig) -> dict[str, Shape]:
    """All of them."""
    return dict(tensors(config))


def _under(prefix: str, inner: Tensors) -> Tensors:
    return ((prefix + name, shape) for name, shape in inner)


def _affine(name: str, out: int, *inner: int) -> Tensors:
    """A weight and a bias, of a linear, a convolution, or (without ``inner``) a norm."""
    yield f"{name}.weight", (out, *inner)
    yield f"{name}.bias", (out,)


def _conv(name: str, out: int, channels: int, kernel: int = 3) -> Tensors:
    return _affine(name, out, channels, kernel, kernel)


def unet(config: UNetConfig) -> Tensors:
    """The UNet's, without ``model.diffusion_model.``."""
    yield from _unet_encoder(config)
    channels, skips = config.block_out_channels, skip_widths(config)  # after as many names: a claim costs nothing
    width, block = channels[-1], 0
    for level, out in reversed(list(enumerate(channels))):
        for i in range(config.layers_per_block + 1):
            yield from _unet_stage(config, f"output_blocks.{block}", level, width + skips.pop())
            width = out
            if level > 0 and i == config.layers_per_block:
                place = 2 if config.transformer_layers[level] else 1
                yield from _conv(f"output_blocks.{block}.{place}.conv", width, width)
            block += 1
    yield from _affine("out.0", width)
    yield from _conv("out.2", config.out_channels, width)


def controlnet(config: ControlConfig) -> Tensors:
    """A ControlNet's, without ``control_model.``."""
    yield from _unet_encoder(config.unet)
    hints, width = config.hint_channels, config.unet.block_out_channels[0]
    yield from _conv("input_hint_block.0", hints[0], config.picture_channels)
    for i, (channels, out) in enumerate(pairwise(hints)):
        yield from _conv(f"input_hint_block.{4 * i + 2}", channels, channels)
        yield from _conv(f"input_hint_block.{4 * i + 4}", out, channels)
    yield from _conv(f"input_hint_block.{4 * len(hints) - 2}", width, hints[-1])
    for i, skip in enumerate(skip_widths(config.unet)):
        yield from _conv(f"zero_convs.{i}.0", skip, skip, 1)
    last = config.unet.block_out_channels[-1]
    yield from _conv("middle_block_out.0", last, last, 1)


def skip_widths(config: UNetConfig) -> list[int]:
    """Channels of what each block of a UNet's way down gives."""
    widths = [config.block_out_channels[0]]
    for level, width in enumerate(config.block_out_channels):
        last = level == len(config.block_out_channels) - 1
        widths += [width] * (config.layers_per_block + (0 if last else 1))
    return widths


def _unet_encoder(config: UNetConfig) -> Tensors:
    """Of the way down and the middle."""
    channels, time = config.block_out_channels, config.time_dim
    yield from _affine("time_embed.0", time, channels[0])
    yield from _affine("time_embed.2", time, time)
    if config.vector_dim:
        yield from _affine("label_emb.0.0", time, config.vector_dim)
        yield from _affine("label_emb.0.2", time, time)

    yield from _conv("input_blocks.0.0", channels[0], config.in_channels)
    width, block = channels[0], 1
    for level, out in enumerate(channels):
        for _ in range(config.layers_per_block):
            yield from _unet_stage(config, f"input_blocks.{block}", level, width)
            width, block = out, block + 1
        if level < len(channels) - 1:
            yield from _conv(f"input_blocks.{block}.0.op", width, width)
            block += 1

    yield from _unet_resnet("middle_block.0", width, width, time)
    yield from _transformer("middle_block.1", config, width, config.mid_transformer_layers)
    yield from _unet_resnet("middle_block.2", width, width, time)


def _unet_stage(config: UNetConfig, name: str, level: int, channels: int) -> Tensors:
    out = config.block_out_channels[level]
    yield from _unet_resnet(f"{name}.0", channels, out, config.time_dim)
    if depth := config.transformer_layers[level]:
        yield from _transformer(f"{name}.1", config, out, depth)


def _unet_resnet(name: str, channels: int, out: int, time: int) -> Tensors:
    yield from _affine(f"{name}.in_layers.0", channels)
    yield from _conv(f"{name}.in_layers.2", out, channels)
    yield from _affine(f"{name}.emb_layers.1", out, time)
    yield from _affine(f"{name}.out_layers.0", out)
    yield from _conv(f"{name}.out_layers.3", out, out)
    if channels != out:
        yield from _conv(f"{name}.skip_connection", out, channels, 1)


def _transformer(name: str, config: UNetConfig, width: int, depth: int) -> Tensors:
    """A spatial transformer; its two projections are linears, or 1x1 convolutions."""
    inner = (width,) if config.linear_projection else (width, 1, 1)
    yield from _affine(f"{name}.norm", width)
    yield from _affine(f"{name}.proj_in", width, *inner)
    for i in range(depth):
        block = f"{name}.transformer_blocks.{i}"
        yield from _attention(f"{block}.attn1", width, width)
        yield from _affine(f"{block}.ff.net.0.proj", 8 * width, width)
        yield from _affine(f"{block}.ff.net.2", width, 4 * width)
        yield from _attention(f"{block}.attn2", width, config.context_dim)
        for norm in ("norm1", "norm2", "norm3"):
            yield from _affine(f"{block}.{norm}", width)
    yield from _affine(f"{name}.proj_out", width, *inner)


def _attention(name: str, width: int, context: int) -> Tensors:
    yield f"{name}.to_q.weight", (width, width)
    yield f"{name}.to_k.weight", (width, context)
    yield f"{name}.to_v.weight", (width, context)
    yield from _affine(f"{name}.to_out.0", width, width)


def vae(config: VAEConfig) -> Tensors:
    """The autoencoder's, without ``first_stage_model.``."""
    channels, latents = config.block_out_channels, config.latent_channels
    yield from _conv("encoder.conv_in", channels[0], config.in_channels)
    width = channels[0]
    for level, out in enumerate(channels):
        yield from _vae_level(f"encoder.down.{level}", width, out, config.layers_per_block)
        width = out
        if level < len(channels) - 1:
            yield from _conv(f"encoder.down.{level}.downsample.conv", out, out)
    yield from _vae_middle("encoder.mid", width)
    yield from _affine("encoder.norm_out", width)
    yield from _conv("encoder.conv_out", 2 * latents, width)

    yield from _conv("decoder.conv_in", channels[-1], latents)
    yield from _vae_middle("decoder.mid", channels[-1])
    for level, out in enumerate(
        channels
    ):  # numbered by resolution, finest first; each takes what the coarser one gives
        coarser = channels[min(level + 1, len(channels) - 1)]
        yield from _vae_level(f"decoder.up.{level}", coarser, out, config.layers_per_block + 1)
        if level > 0:
            yield from _conv(f"decoder.up.{level}.upsample.conv", out, out)
    yield from _affine("decoder.norm_out", channels[0])
    yield from _conv("decoder.conv_out", config.in_channels, channels[0])
    yield from _conv("quant_conv", 2 * latents, 2 * latents, 1)
    yield from _conv("post_quant_conv", latents, latents, 1)


def _vae_level(name: str, channels: int, out: int, layers: int) -> Tensors:
    for j in range(layers):
        yield from _vae_resnet(f"{name}.block.{j}", channels if j == 0 else out, out)


def _vae_middle(name: str, width: int) -> Tensors:
    yield from _vae_resnet(f"{name}.block_1", width, width)
    yield from _affine(f"{name}.attn_1.norm", width)
    for leaf in ("q", "k", "v", "proj_out"):
        yield from _conv(f"{name}.attn_1.{leaf}", width, width, 1)
    yield from _vae_resnet(f"{name}.block_2", width, width)


def _vae_resnet(name: str, channels: int, out: int) -> Tensors:
    yield from _affine(f"{name}.norm1", channels)
    yield from _conv(f"{name}.conv1", out, channels)
    yield from _affine(f"{name}.norm2", out)
    yield from _conv(f"{name}.conv2", out, out)
    if channels != out:
        yield from _conv(f"{name}.nin_shortcut", out, channels, 1)


def clip_text(config: TextConfig) -> Tensors:
    """transformers' CLIPTextModel, names as in its version 4; with a projection, CLIPTextModelWithProjection."""
    width = config.hidden_size
    yield "text_model.embeddings.token_embedding.weight", (config.vocab_size, width)
    yield "text_model.embeddings.position_embedding.weight", (config.max_position_embeddings, width)
    yield from _under("text_model.", _clip_layers(config))
    yield from _affine("text_model.final_layer_norm", width)
    if config.projection_dim:
        yield "text_projection.weight", (config.projection_dim, width)


def _clip_layers(config: TextConfig | SafetyConfig) -> Tensors:
    """The transformer layers of transformers' CLIP models, text and vision alike."""
    width, inner = config.hidden_size, config.intermediate_size
    for i in range(config.num_hidden_layers):
        layer = f"encoder.layers.{i}"
        for leaf in ("k_proj", "v_proj", "q_proj", "out_proj"):
            yield from _affine(f"{layer}.self_attn.{leaf}", width, width)
        yield from _affine(f"{layer}.mlp.fc1", inner, width)
        yield from _affine(f"{layer}.mlp.fc2", width, inner)
        yield from _affine(f"{layer}.layer_norm1", width)
        yield from _affine(f"{layer}.layer_norm2", width)


def openclip_text(config: TextConfig) -> Tensors:
    """OpenCLIP's text transformer. Its ``text_projection`` is [in, out]."""
    width, inner = config.hidden_size, config.intermediate_size
    yield "token_embedding.weight", (config.vocab_size, width)
    yield "positional_embedding", (config.max_position_embeddings, width)
    yield "text_projection", (width, config.projection_dim)
    yield from _affine("ln_final", width)
    for i in range(config.num_hidden_layers):
        layer = f"transformer.resblocks.{i}"
        yield f"{layer}.attn.in_proj_weight", (3 * width, width)
        yield f"{layer}.attn.in_proj_bias", (3 * width,)
        yield from _affine(f"{layer}.attn.out_proj", width, width)
        yield from _affine(f"{layer}.mlp.c_fc", inner, width)
        yield from _affine(f"{layer}.mlp.c_proj", width, inner)
        yield from _affine(f"{layer}.ln_1", width)
        yield from _affine(f"{layer}.ln_2", width)


def safety(config: SafetyConfig) -> Tensors:
    """diffusers' StableDiffusionSafetyChecker, names as transformers 4 gives them."""
    width, patches = config.hidden_size, (config.image_size // config.patch_size) ** 2
    vision = "vision_model.vision_model."
    yield f"{vision}embeddings.class_embedding", (width,)
    yield f"{vision}embeddings.patch_embedding.weight", (width, 3, config.patch_size, config.patch_size)
    yield f"{vision}embeddings.position_embedding.weight", (patches + 1, width)
    yield from _under(vision, _affine("pre_layrnorm", width))
    yield from _under(vision, _clip_layers(config))
    yield from _under(vision, _affine("post_layernorm", width))
    yield "visual_projection.weight", (config.projection_dim, width)
    for name, count in (("concept", config.concepts), ("special_care", config.special_care)):
        yield f"{name}_embeds", (count, config.projection_dim)
        yield f"{name}_embeds_weights", (count,)
