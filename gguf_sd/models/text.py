"""The CLIP text encoder: transformers' implementation, our names and configuration."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from gguf_sd.config import TextConfig
from gguf_sd.load import Source, assign


class TextEncoder(nn.Module):
    """Prompts as token ids to the hidden states that the UNet attends to."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.model = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                num_hidden_layers=config.num_hidden_layers,
                num_attention_heads=config.num_attention_heads,
                max_position_embeddings=config.max_position_embeddings,
                hidden_act=config.hidden_act,
                bos_token_id=config.bos_token_id,
                eos_token_id=config.eos_token_id,
                pad_token_id=config.pad_token_id,
                attn_implementation="sdpa",
            )
        )

    @classmethod
    def load(cls, config: TextConfig, tensors: Mapping[str, Source], dtype: torch.dtype, where: str) -> TextEncoder:
        """Builds the encoder from tensors named as in transformers 4 (``text_model.…``); ``where`` names the file in
        errors."""
        with torch.device("meta"):
            encoder = cls(config)
        prefixed = any(name.startswith("text_model.") for name, _ in encoder.model.named_parameters())
        if not prefixed:  # transformers 5 dropped the level
            tensors = {name.removeprefix("text_model."): source for name, source in tensors.items()}
        assign(encoder.model, tensors, dtype, where, keep_quantized=False)
        for name, buffer in list(encoder.model.named_buffers()):
            owner, _, leaf = name.rpartition(".")
            if leaf != "position_ids":
                raise RuntimeError(f"transformers' CLIP has a buffer {name} that is not known here")
            setattr(encoder.model.get_submodule(owner), leaf, torch.arange(buffer.shape[-1])[None])
        return encoder.eval()

    @torch.inference_mode()
    def encode(self, ids: Tensor) -> Tensor:
        """Token ids [B, 77] -> last hidden states after the final LayerNorm [B, 77, hidden_size]."""
        return self.model(input_ids=ids).last_hidden_state
