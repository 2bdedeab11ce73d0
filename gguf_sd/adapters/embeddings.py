"""Textual inversion (Gal et al. 2022, arXiv:2208.01618): vectors that a word in a prompt stands for.

Read are AUTOMATIC1111's files (``string_to_param`` or ``emb_params``), diffusers' (the word and its vectors) and pairs
for SDXL (``clip_l`` and ``clip_g``). Pickles are read as descriptions, see :mod:`gguf_sd.checkpoint.pickles`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from gguf_sd.adapters.embedding_files import MAX_NAME, NO_NAME, EmbeddingFile
from gguf_sd.checkpoint.finite import is_finite
from gguf_sd.checkpoint.pickles import Call
from gguf_sd.checkpoint.safetensors_header import is_safetensors
from gguf_sd.checkpoint.torch_file import TorchFile
from gguf_sd.config import ModelConfig
from gguf_sd.errors import GgufSdError
from gguf_sd.field_checks import called, shown

PAIRS = (("clip_l", "clip_g"), ("text_encoders_0", "text_encoders_1"))
NAMELESS = {"*", "emb_params", "clip_l", "clip_g", "string_to_param.*", "text_encoders_0", "text_encoders_1"}
MAX_TENSORS = 16
A1111 = "string_to_param"


@dataclass(frozen=True, eq=False)
class Embedding:
    """``names`` stand for it, in any case; ``vectors`` are float32 [n, width], one an encoder."""

    names: tuple[str, ...]
    vectors: tuple[Tensor, ...]
    path: Path

    def __len__(self) -> int:
        return len(self.vectors[0])

    def __str__(self) -> str:
        return f"{self.names[0]}={self.path}"


class Words:
    """Finds the names of embeddings in a text."""

    def __init__(self, embeddings: Sequence[Embedding]):
        self.embeddings = embeddings
        self._by_name = {name.lower(): index for index, x in enumerate(embeddings) for name in x.names}
        longest_first = sorted(self._by_name, key=len, reverse=True)
        self._pattern = re.compile(f"({'|'.join(_alone(name) for name in longest_first)})", re.IGNORECASE)

    def split(self, text: str) -> list[tuple[str, int | None]]:
        """The text in pieces, each with the index of the embedding that it is a name of."""
        if not self._by_name:
            return [(text, None)]
        pieces = self._pattern.split(text)
        return [(piece, self._by_name[piece.lower()] if i % 2 else None) for i, piece in enumerate(pieces) if piece]

    def used(self, *texts: str | None) -> list[Embedding]:
        """Those that texts name."""
        found = {index for text in texts if text for _, index in self.split(text) if index is not None}
        return [self.embeddings[index] for index in sorted(found)]


def _alone(name: str) -> str:
    """A name that begins or ends with a letter is not part of a longer word."""
    before, after = r"(?<!\w)" if re.match(r"\w", name) else "", r"(?!\w)" if re.search(r"\w$", name) else ""
    return f"{before}{re.escape(name)}{after}"


def load_embeddings(files: Iterable[EmbeddingFile], config: ModelConfig) -> tuple[Embedding, ...]:
    """Raises GgufSdError for files that are no embeddings, or not for this model, and words that name two."""
    loaded = [_load(file, (stat := file.path.stat()).st_mtime_ns + stat.st_size, config) for file in files]
    seen: dict[str, Embedding] = {}
    for embedding in loaded:
        for name in embedding.names:
            if (other := seen.setdefault(name.lower(), embedding)) is not embedding:
                raise GgufSdError(
                    f"{shown(name)} names two embeddings, {other.path} and {embedding.path}; give one as NAME=FILE"
                )
    return tuple(loaded)


@lru_cache(maxsize=128)
def _load(file: EmbeddingFile, stamp: int, config: ModelConfig) -> Embedding:
    stored = _tensors(file.path)
    vectors = tuple(_checked(file.path, tensor.float()) for tensor in _by_encoder(file.path, stored, config))
    if len({len(each) for each in vectors}) > 1:
        raise GgufSdError(f"{file.path} has {' and '.join(str(len(x)) for x in vectors)} vectors for the two encoders")
    room = config.text[0].max_position_embeddings - 2
    if len(vectors[0]) > room:
        raise GgufSdError(f"{file.path} has {len(vectors[0])} vectors; a chunk of a prompt has room for {room}")
    names = [file.main_name]
    inner = next(iter(stored))
    if file.name is None and len(stored) == 1 and inner not in NAMELESS and inner.lower() != names[0].lower():
        names += [inner] if not NO_NAME.search(inner) and len(inner) <= MAX_NAME else []
    return Embedding(tuple(names), vectors, file.path)


def _by_encoder(path: Path, stored: Mapping[str, Tensor], config: ModelConfig) -> list[Tensor]:
    """The vectors of each of the model's text encoders, [width] or [n, width]."""
    pair = next((pair for pair in PAIRS if pair[1] in stored), None)
    widths = [text.hidden_size for text in config.text]
    wanted = "pairs of vectors for two text encoders (clip_l, clip_g)" if len(widths) > 1 else "vectors for one encoder"
    if (pair is not None) != (len(widths) > 1) or (pair is None and len(stored) > 1):
        kinds = ", ".join(f"{shown(name)} {list(tensor.shape)}" for name, tensor in list(stored.items())[:3])
        raise GgufSdError(f"{path} holds {kinds}; this model takes {wanted}")
    if pair is not None and any(name not in stored for name in pair):
        raise GgufSdError(f"{path} holds no {pair[0]} beside {pair[1]}")
    found = [stored[name] for name in pair] if pair else [next(iter(stored.values()))]
    for tensor, width in zip(found, widths, strict=True):
        if tensor.dim() not in (1, 2) or tensor.shape[-1] != width or not tensor.numel():
            raise GgufSdError(
                f"{path} holds vectors of shape {list(tensor.shape)}, the model's text encoder takes [n, {width}]; "
                "it is an embedding for another model"
            )
    return found


def _checked(path: Path, vectors: Tensor) -> Tensor:
    if not is_finite(vectors):
        raise GgufSdError(f"{path} holds NaN or infinity; get an intact copy of the embedding")
    return vectors.detach().reshape(-1, vectors.shape[-1]).clone()


def _tensors(path: Path) -> dict[str, Tensor]:
    tensors = _safetensors(path) if is_safetensors(path) else _pickled(path)
    if not tensors or len(tensors) > MAX_TENSORS or not all(x.is_floating_point() for x in tensors.values()):
        raise GgufSdError(
            f"{path} is no embedding: it holds {len(tensors)} tensors; an embedding has one, or two for SDXL"
        )
    return tensors


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names[: MAX_TENSORS + 1]}
    except (OSError, SafetensorError) as error:
        raise GgufSdError(f"cannot read the embedding {path}: {called(str(error))}") from error


def _pickled(path: Path) -> dict[str, Tensor]:
    """Of a ParameterDict, in which old versions of AUTOMATIC1111 kept the vectors, the parameters are taken."""
    file = TorchFile.open(path, "embedding")
    content = file.content
    if isinstance(content, dict) and A1111 in content:
        inner = content[A1111]
        if isinstance(inner, Call):
            inner = inner.state.get("_parameters") if isinstance(inner.state, dict) else None
        content = {f"{A1111}.*": value for value in inner.values()} if isinstance(inner, dict) else {}
    found = file.tensors(content if isinstance(content, dict) else {"*": content})
    return {name: tensor.load() for name, tensor in list(found.items())[: MAX_TENSORS + 1]}
