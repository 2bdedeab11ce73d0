"""Tensors of weight files that are known at once and read when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class Blocks:
    """How a quantised tensor lies in a GGUF file: its GGML type, its shape there in torch order, whether the rows of a
    convolution hold (kh, kw, in), and what reads its bytes, uint8; None once its values were changed."""

    type: str
    shape: tuple[int, ...]
    tap_major: bool
    read: Callable[[], Tensor] | None


@dataclass(frozen=True)
class Entry:
    """One tensor that can be read. ``load`` returns a contiguous tensor of this shape and dtype, decoded where it has
    ``blocks``."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]
    blocks: Blocks | None = None

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def in_memory(values: Mapping[str, Tensor]) -> dict[str, Entry]:
    """Entries of tensors that are there already."""
    return {name: Entry(tuple(x.shape), x.dtype, partial(torch.clone, x)) for name, x in values.items()}


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of one or more weight files, under the names that stand there."""

    entries: dict[str, Entry]
    files: tuple[Path, ...]
    metadata: dict[str, str] = field(default_factory=dict)
