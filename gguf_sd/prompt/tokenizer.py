"""Prompts to CLIP token ids, with the tokenizer that the model's file carries."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from gguf_sd.adapters.embeddings import Embedding, Words
from gguf_sd.checkpoint.metadata_keys import TOKENIZER
from gguf_sd.config import TextConfig
from gguf_sd.errors import GgufSdError
from gguf_sd.prompt.clip_bpe import END, START, build, read_clip_bpe, rust_errors
from gguf_sd.prompt.prompts import parse

MAX_CHUNKS = 100  # of a prompt: each costs a pass of the text encoders, and attention at every step


class Tokens(NamedTuple):
    """A prompt in chunks of what the text encoder takes at once, N = ``max_position_embeddings`` tokens."""

    ids: Tensor  # int64 [chunks, N], each: start, tokens, end, padding
    weights: Tensor  # float32 [chunks, N]

    def padded(self, chunks: int, config: TextConfig) -> Tokens:
        """With empty chunks at the end, ``chunks`` in all."""
        empty = _chunk([], config)
        ids = [self.ids, *(torch.tensor([[i for i, _ in empty]]) for _ in range(chunks - len(self.ids)))]
        extra = torch.ones(chunks - len(self.ids), self.weights.shape[1])
        return Tokens(torch.cat(ids), torch.cat([self.weights, extra]))


class Tokenizer:
    """CLIP's byte-pair encoding. ``text`` is the `tokenizers.Tokenizer.to_str` JSON of it, of which the tables are
    taken; ``where`` names the file in the GgufSdError raised for one that is damaged or of another kind."""

    def __init__(self, text: str, where: str):
        self._what = f"{where} carries a tokenizer ({TOKENIZER}) that"
        bpe = read_clip_bpe(text, self._what)
        self._bpe = build(bpe, START, END, self._what)

    def encode(self, prompt: str, config: TextConfig, embeddings: Sequence[Embedding] = ()) -> Tokens:
        """The prompt's tokens with their weights (:mod:`gguf_sd.prompt.prompts`), in at least one chunk.

        The vectors of ``embeddings`` have the ids behind the vocabulary, in order; those of one are in one chunk."""
        room = config.max_position_embeddings - 2
        words = Words(embeddings)
        ends = list(accumulate((len(x) for x in embeddings), initial=config.vocab_size))
        own = [range(*pair) for pair in pairwise(ends)]
        chunks: list[list[tuple[int, float]]] = [[]]
        for part in parse(prompt):
            if part.text is None:
                chunks.append([])
                continue
            for text, embedding in words.split(part.text):
                if embedding is not None:
                    if len(chunks[-1]) + len(own[embedding]) > room:
                        chunks.append([])
                    chunks[-1] += [(token, part.weight) for token in own[embedding]]
                    continue
                for token in self._ids(text, config):
                    if len(chunks[-1]) == room:
                        chunks.append([])
                    chunks[-1].append((token, part.weight))
        if len(chunks) > MAX_CHUNKS:
            raise GgufSdError(
                f"the prompt has {len(chunks)} chunks of up to {room} tokens; gguf-sd takes {MAX_CHUNKS}: shorten it"
            )
        rows = [_chunk(chunk, config) for chunk in chunks]
        ids = torch.tensor([[token for token, _ in row] for row in rows])
        return Tokens(ids, torch.tensor([[weight for _, weight in row] for row in rows]))

    def _ids(self, text: str, config: TextConfig) -> list[int]:
        with rust_errors(self._what):
            ids: list[int] = self._bpe.encode(text, add_special_tokens=False).ids
        if ids and max(ids) >= config.vocab_size:
            raise GgufSdError(
                f"the tokenizer gives token {max(ids)}, the text encoder knows {config.vocab_size}; "
                "they do not belong together"
            )
        return ids


def _chunk(tokens: list[tuple[int, float]], config: TextConfig) -> list[tuple[int, float]]:
    row = [(config.bos_token_id, 1.0), *tokens, (config.eos_token_id, 1.0)]
    return row + [(config.pad_token_id, 1.0)] * (config.max_position_embeddings - len(row))
