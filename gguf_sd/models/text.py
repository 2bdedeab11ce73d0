"""The CLIP text encoders: transformers' implementation, our names and configuration."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from gguf_sd.checkpoint.assign import Source, assign
from gguf_sd.checkpoint.quant_tensor import QuantTensor
from gguf_sd.checkpoint.tensor_names import OPENCLIP, OPENCLIP_LAYER
from gguf_sd.config import TextConfig

OPENCLIP_BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)\.(weight|bias)")
OPENCLIP_QKV = re.compile(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)")


class Encoded(NamedTuple):
    """What a text encoder makes of token ids."""

    states: Tensor  # [B, N, hidden_size]
    pooled: Tensor | None  # [B, projection_dim], the projected end-of-text token, of encoders with a projection


class TextEncoder(nn.Module):
    """Prompts as token ids to the hidden states that the UNet attends to."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        kind = CLIPTextModelWithProjection if config.projection_dim else CLIPTextModel
        self.model = kind(
            CLIPTextConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                num_hidden_layers=config.num_hidden_layers,
                num_attention_heads=config.num_attention_heads,
                max_position_embeddings=config.max_position_embeddings,
                hidden_act=config.hidden_act,
                projection_dim=config.projection_dim or config.hidden_size,
                bos_token_id=config.bos_token_id,
                eos_token_id=config.eos_token_id,
                pad_token_id=config.pad_token_id,
                attn_implementation="sdpa",
            )
        )

    @classmethod
    def load(cls, config: TextConfig, tensors: Mapping[str, Source], dtype: torch.dtype, where: str) -> TextEncoder:
        """Builds the encoder from tensors named as in transformers (with or without ``text_model.``) or OpenCLIP;
        ``where`` names the file in errors."""
        with torch.device("meta"):
            encoder = cls(config)
        if "positional_embedding" in tensors:
            tensors = from_openclip(tensors)
        bare = {name.removeprefix("text_model."): source for name, source in tensors.items()}
        names = {name.removeprefix("text_model."): name for name, _ in encoder.model.named_parameters()}
        assign(encoder.model, {names.get(k, k): source for k, source in bare.items()}, dtype, where, False)
        for name, buffer in list(encoder.model.named_buffers()):
            owner, _, leaf = name.rpartition(".")
            if leaf != "position_ids":
                raise RuntimeError(f"transformers' CLIP has a buffer {name} that is not known here")
            setattr(encoder.model.get_submodule(owner), leaf, torch.arange(buffer.shape[-1])[None])
        return encoder.eval()

    @torch.inference_mode()
    def encode(self, ids: Tensor, clip_skip: int, normalise: bool) -> Encoded:
        """Token ids [B, N], N = ``config.max_position_embeddings``, to the states after the last layer (``clip_skip``
        1), the last but one (2) and so on; with the final LayerNorm where ``normalise``, as SD 1.x has it."""
        output = self.model(input_ids=ids, output_hidden_states=True)
        states = output.hidden_states[-clip_skip]
        if normalise:
            transformer = getattr(self.model, "text_model", self.model)  # transformers 5 dropped the level
            states = transformer.final_layer_norm(states)
        return Encoded(states, output.text_embeds if self.config.projection_dim else None)


def from_openclip(tensors: Mapping[str, Source]) -> dict[str, Source]:
    """An OpenCLIP text transformer's tensors under transformers' names: queries, keys and values apart, the text
    projection [in, out] transposed."""
    result: dict[str, Source] = {}
    for name, source in tensors.items():
        if name in OPENCLIP:
            result[OPENCLIP[name]] = source
        elif name == "text_projection":
            result["text_projection.weight"] = partial(_transposed, source)
        elif match := OPENCLIP_QKV.fullmatch(name):
            layer, leaf = match.groups()
            for i, projection in enumerate("qkv"):
                result[f"encoder.layers.{layer}.self_attn.{projection}_proj.{leaf}"] = partial(_third, source, i)
        elif (match := OPENCLIP_BLOCK.fullmatch(name)) and match[2] in OPENCLIP_LAYER:
            layer, module, leaf = match.groups()
            result[f"encoder.layers.{layer}.{OPENCLIP_LAYER[module]}.{leaf}"] = source
        else:
            result[name] = source  # for the loader to name
    return result


def _full(source: Source) -> Tensor:
    stored = source()
    return stored.dequantize() if isinstance(stored, QuantTensor) else stored


def _transposed(source: Source) -> Tensor:
    return _full(source).t()


def _third(source: Source, index: int) -> Tensor:
    return _full(source).chunk(3)[index]
