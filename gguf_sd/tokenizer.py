"""Prompts to CLIP token ids, with the tokenizer that the model's file carries."""

from __future__ import annotations

import logging

import tokenizers
import torch
from torch import Tensor

from gguf_sd.config import TextConfig
from gguf_sd.errors import GgufSdError

METADATA_KEY = "tokenizer.huggingface.json"
log = logging.getLogger(__name__)


class Tokenizer:
    """CLIP's byte-pair encoding. ``text`` is the `tokenizers.Tokenizer.to_str` JSON of it."""

    def __init__(self, text: str, where: str):
        try:
            self._bpe = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # tokenizers raises plain Exception
            raise GgufSdError(f"{where} carries a damaged tokenizer ({METADATA_KEY}): {error}") from error

    def encode(self, prompt: str, config: TextConfig) -> Tensor:
        """Ids [1, max_position_embeddings]: start, the prompt, end, padding. A prompt that is too long is cut, with a
        warning that quotes what was lost."""
        room = config.max_position_embeddings - 2
        encoding = self._bpe.encode(prompt, add_special_tokens=False)
        ids = encoding.ids
        if len(ids) > room:
            lost = prompt[encoding.offsets[room][0] :]
            log.warning("the prompt has %d tokens, %d fit; this is cut: %s", len(ids), room, lost)
            ids = ids[:room]
        ids = [config.bos_token_id, *ids, config.eos_token_id]
        ids += [config.pad_token_id] * (config.max_position_embeddings - len(ids))
        if max(ids) >= config.vocab_size:
            raise GgufSdError(
                f"the tokenizer gives token {max(ids)}, the text encoder knows {config.vocab_size}; "
                "they do not belong together"
            )
        return torch.tensor([ids])
