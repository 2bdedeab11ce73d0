"""The CLIP text transformers of Stable Diffusion: CLIP ViT-L/14's (SD 1.x, SDXL) and OpenCLIP ViT-bigG/14's (SDXL).

Radford et al. 2021 (arXiv:2103.00020): a causal transformer with a LayerNorm before each attention and MLP. Module
names are those of transformers' CLIPTextModel.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gguf_sd.checkpoint.assign import Deferred, Source, assign
from gguf_sd.checkpoint.quant_tensor import QuantTensor
from gguf_sd.checkpoint.tensor_names import OPENCLIP, OPENCLIP_LAYER
from gguf_sd.config import TextConfig
from gguf_sd.errors import GgufSdError
from gguf_sd.models.layers import LayerNorm, Linear

OPENCLIP_BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)\.(weight|bias)")
OPENCLIP_QKV = re.compile(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)")


class Encoded(NamedTuple):
    """What a text encoder makes of token ids."""

    states: Tensor  # [B, N, hidden_size]
    pooled: Tensor | None  # [B, projection_dim], the projected end-of-text token, of encoders with a projection


def quick_gelu(x: Tensor) -> Tensor:
    """OpenAI's approximation of GELU: x * sigmoid(1.702 x)."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class Embedding(nn.Embedding):
    """Rows to be loaded."""

    def reset_parameters(self) -> None:
        """Draws nothing: on the meta device torch imports its compiler to draw normal numbers, for seconds."""


class TokenEmbedding(Embedding):
    """A table of which few rows are used."""

    by_row = True
    gather: Callable[[Tensor], Tensor] | None = None  # int64 [B, N] -> [B, N, D], where the table is not held

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) if self.gather is None else self.gather(ids)


class Embeddings(nn.Module):
    """Tokens and their positions."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.token_embedding = TokenEmbedding(config.vocab_size, config.hidden_size)
        self.position_embedding = Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, ids: Tensor, own: Tensor | None = None) -> Tensor:
        """int64 [B, N] -> [B, N, hidden_size]; ids behind the vocabulary are rows of ``own`` [n, hidden_size]."""
        size = self.token_embedding.num_embeddings
        found = self.token_embedding(ids if own is None else ids.clamp(max=size - 1))
        if own is not None:
            rows = own.to(found)[(ids - size).clamp(min=0)]
            found = torch.where((ids >= size)[..., None], rows, found)
        return found + self.position_embedding.weight[: ids.shape[1]]


class CausalAttention(nn.Module):
    """Multi-head self-attention in which no token sees a later one."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj = (Linear(dim, dim) for _ in "qkv")
        self.out_proj = Linear(dim, dim)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """x and residual [B, N, dim] -> [B, N, dim]."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (projection(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for projection in projections)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(attended.transpose(1, 2).flatten(2), residual)


class MLP(nn.Module):
    def __init__(self, dim: int, inner: int, activation: Callable[[Tensor], Tensor]):
        super().__init__()
        self.fc1, self.fc2, self.activation = Linear(dim, inner), Linear(inner, dim), activation

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)), residual)


class Layer(nn.Module):
    """Self-attention and an MLP, each with a LayerNorm before it and around it a skip connection."""

    def __init__(self, config: TextConfig):
        super().__init__()
        dim = config.hidden_size
        self.layer_norm1, self.layer_norm2 = LayerNorm(dim), LayerNorm(dim)
        self.self_attn = CausalAttention(dim, config.num_attention_heads)
        self.mlp = MLP(dim, config.intermediate_size, ACTIVATIONS[config.hidden_act])

    def forward(self, x: Tensor) -> Tensor:
        x = self.self_attn(self.layer_norm1(x), x)
        return self.mlp(self.layer_norm2(x), x)


class Encoder(nn.Module):
    """The layers, under the name that they have in checkpoints."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))


class TextEncoder(nn.Module):
    """Prompts as token ids to the hidden states that the UNet attends to. Raises GgufSdError for a configuration that
    is no CLIP text transformer's."""

    def __init__(self, config: TextConfig):
        super().__init__()
        _check(config)
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = LayerNorm(config.hidden_size)
        if config.projection_dim:
            self.text_projection = Linear(config.hidden_size, config.projection_dim, bias=False)

    @classmethod
    def load(
        cls,
        config: TextConfig,
        tensors: Mapping[str, Source],
        dtype: torch.dtype,
        where: str,
        deferred: dict[str, Deferred] | None = None,
        prefix: str = "",
    ) -> TextEncoder:
        """Builds the encoder from tensors named as in transformers (with or without ``text_model.``) or OpenCLIP;
        ``where`` names the file in errors, ``prefix`` stands before the names there. ``deferred``: see
        :func:`gguf_sd.checkpoint.assign.assign`."""
        with torch.device("meta"):
            encoder = cls(config)
        if "positional_embedding" in tensors:
            tensors = from_openclip(tensors)
        bare = {name.removeprefix("text_model."): source for name, source in tensors.items()}
        assign(encoder, bare, dtype, where, keep_quantized=False, prefix=prefix, deferred=deferred)
        return encoder.eval()

    @torch.inference_mode()
    def encode(self, ids: Tensor, clip_skip: int, normalise: bool, own: Tensor | None = None) -> Encoded:
        """Token ids [B, N], N at most ``config.max_position_embeddings``, to the states after the last layer
        (``clip_skip`` 1), the last but one (2) and so on; with the final LayerNorm where ``normalise``, as SD 1.x has
        it. ``own``: vectors of ids behind the vocabulary."""
        x = states = self.embeddings(ids, own)
        wanted = len(self.encoder.layers) - clip_skip
        for index, layer in enumerate(self.encoder.layers):
            if index > wanted and not self.config.projection_dim:
                break
            x = layer(x)
            states = x if index == wanted else states
        pooled = self._pooled(x, ids) if self.config.projection_dim else None
        return Encoded(self.final_layer_norm(states) if normalise else states, pooled)

    def _pooled(self, last: Tensor, ids: Tensor) -> Tensor:
        """The last layer's states [B, N, hidden_size] at each text's first end token, projected [B, projection_dim]."""
        end = (ids == self.config.eos_token_id).int().argmax(dim=-1)
        at_end = last[torch.arange(len(ids), device=ids.device), end]
        return self.text_projection(self.final_layer_norm(at_end))


def _check(config: TextConfig) -> None:
    if config.hidden_act not in ACTIVATIONS:
        raise GgufSdError(f"no text encoder with activation {config.hidden_act!r}; there are {', '.join(ACTIVATIONS)}")
    if config.hidden_size % config.num_attention_heads:
        raise GgufSdError(
            f"a text encoder's width {config.hidden_size} does not split into {config.num_attention_heads} heads"
        )


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
    stored = source()
    if isinstance(stored, QuantTensor):
        return stored.dequantize().chunk(3)[index].clone()  # the other two go
    return stored.chunk(3)[index]
