"""Prompts through the text encoders: what the UNet is conditioned on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from gguf_sd.adapters.embeddings import Embedding
from gguf_sd.adapters.lora import without_tags
from gguf_sd.config import ModelConfig
from gguf_sd.errors import GgufSdError, not_finite
from gguf_sd.models.text import Encoded, TextEncoder
from gguf_sd.models.unet import timestep_embedding
from gguf_sd.prompt.tokenizer import Tokenizer
from gguf_sd.request import Job
from gguf_sd.sampling.guidance import Conditioning, Prompt

SIZE_EMBEDDING = 256  # width of the embedding of each of SDXL's six sizes

Lend = Callable[[int], AbstractContextManager[TextEncoder]]  # text encoder by its number


@dataclass(frozen=True)
class _Text:
    """A prompt to encode. ``chunks``: as many as the longer of prompt and negative prompt has, for guidance in one
    batch."""

    text: str
    chunks: int
    clip_skip: int | None
    embeddings: tuple[Embedding, ...]


@dataclass(frozen=True)
class PromptEncoder:
    """Encodes jobs' prompts with a model's tokenizer and text encoders, one encoder at a time."""

    config: ModelConfig
    tokenizer: Tokenizer
    device: torch.device

    @torch.inference_mode()
    def __call__(self, jobs: Sequence[Job], lend: Lend) -> list[Conditioning]:
        """The conditioning of each job, for one picture. Raises GgufSdError where an encoder produces values that are
        not finite."""
        wanted = [self._texts(job) for job in jobs]
        texts = list(dict.fromkeys(text for pair in wanted for text in pair if text is not None))
        encoded: dict[_Text, list[Encoded]] = {text: [] for text in texts}
        for index in range(len(self.config.text)):
            self._through(index, lend, encoded)
        return [self._conditioning(job, *pair, encoded) for job, pair in zip(jobs, wanted, strict=True)]

    def _through(self, index: int, lend: Lend, encoded: dict[_Text, list[Encoded]]) -> None:
        """All texts through one encoder, which nothing refers to afterwards: the next one may need its memory."""
        with lend(index) as encoder:
            for text, results in encoded.items():
                results.append(self._encode(index, encoder, text))

    def chunks(self, job: Job) -> int:
        """Chunks of the longer of a job's prompt and negative prompt."""
        return self._texts(job)[0].chunks

    def _texts(self, job: Job) -> tuple[_Text, _Text | None]:
        """A job's prompt and negative prompt; None for one that is not encoded."""
        negative = job.negative_prompt if job.guided else None
        if job.guided and negative is None and not self.config.zero_empty_negative:
            negative = ""
        both = [text for text in (without_tags(job.prompt), negative) if text is not None]
        words = job.embeddings
        chunks = max(len(self.tokenizer.encode(text, self.config.text[0], words).ids) for text in both)
        first, *second = [_Text(text, chunks, job.clip_skip, words) for text in both]
        return first, second[0] if second else None

    def _encode(self, index: int, encoder: TextEncoder, text: _Text) -> Encoded:
        """Chunks [C, N] to states [1, C * N, hidden_size], weighted; pooled is the first chunk's.

        SD 1.x attends to the last states, normalised; SDXL to the last but one as they are.
        """
        config = self.config.text[index]
        tokens = self.tokenizer.encode(text.text, config, text.embeddings).padded(text.chunks, config)
        own = torch.cat([x.vectors[index] for x in text.embeddings]) if text.embeddings else None
        xl = bool(self.config.unet.vector_dim)
        states, pooled = encoder.encode(tokens.ids.to(self.device), text.clip_skip or (2 if xl else 1), not xl, own)
        states = weighted(states, tokens.weights.to(states)).flatten(0, 1)[None]
        if not states.isfinite().all() or (pooled is not None and not pooled[:1].isfinite().all()):
            raise GgufSdError(not_finite(f"text encoder {index + 1}", states.dtype))
        return Encoded(states, None if pooled is None else pooled[:1])

    def _conditioning(
        self, job: Job, text: _Text, negative: _Text | None, encoded: dict[_Text, list[Encoded]]
    ) -> Conditioning:
        """SDXL's missing negative prompt is all zeros, an empty one is encoded, as in diffusers."""
        positive = self._prompt(encoded[text], job)
        if not job.guided:
            return Conditioning(positive, None)
        without = encoded[negative] if negative is not None else [_zeroed(result) for result in encoded[text]]
        return Conditioning(positive, self._prompt(without, job))

    def _prompt(self, encoded: Sequence[Encoded], job: Job) -> Prompt:
        """SDXL attends to both encoders' states side by side, and takes the pooled text and the picture's sizes besides
        (Podell et al. 2023, arXiv:2307.01952)."""
        context = torch.cat([result.states for result in encoded], dim=-1)
        pooled = encoded[-1].pooled
        if pooled is None:
            return Prompt(context)
        # Each pair as height and width, top and left.
        pairs = job.original_size[::-1], job.crop[::-1], (job.height, job.width)
        sizes = torch.tensor(pairs, device=self.device).flatten()
        embedded = timestep_embedding(sizes, SIZE_EMBEDDING).flatten()[None]
        return Prompt(context, torch.cat([pooled, embedded.to(pooled)], dim=-1))


def _zeroed(encoded: Encoded) -> Encoded:
    pooled = None if encoded.pooled is None else torch.zeros_like(encoded.pooled)
    return Encoded(torch.zeros_like(encoded.states), pooled)


def weighted(states: Tensor, weights: Tensor) -> Tensor:
    """States [C, N, D] times the weights [C, N] of their tokens, the mean of each chunk kept as it was, as
    AUTOMATIC1111 does. Weights of 1 change nothing."""
    if (weights == 1).all():
        return states
    scaled = states * weights[..., None]
    return scaled * (states.float().mean((1, 2), True) / scaled.float().mean((1, 2), True)).to(states)
