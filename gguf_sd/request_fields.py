"""The fields of a request brought to the types that they are declared with."""

from __future__ import annotations

import math
import numbers
import operator
import os
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from gguf_sd.adapters.embedding_files import as_embeddings
from gguf_sd.adapters.lora import as_loras
from gguf_sd.control import as_controls
from gguf_sd.errors import GgufSdError

if TYPE_CHECKING:
    from gguf_sd.request import Request


def typed(request: Request) -> Request:
    """Plain Python values in place of numpy's; None where a field has no such value means its default.

    Raises GgufSdError for a value of another type, a number that is not finite and a text that is not Unicode.
    """
    changed: dict[str, Any] = {}
    for field in fields(request):
        value = getattr(request, field.name)
        if value is None:
            changed[field.name] = field.default
            continue
        what, convert = KINDS[field.name]
        try:
            changed[field.name] = convert(value)
        except (TypeError, ValueError):
            shown = repr(value)
            shown = shown if len(shown) <= 60 else shown[:59] + "…"
            raise GgufSdError(f"{field.name.replace('_', ' ')} must be {what}, got {shown}") from None
    return replace(request, **changed)


def _whole(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError
    return operator.index(value)


def _real(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise TypeError
    return float(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    value.encode()  # a ValueError for half of a surrogate pair, as from a command line in another encoding
    return value


def _pair(value: Any) -> tuple[int, int]:
    if not isinstance(value, Iterable) or isinstance(value, str):
        raise TypeError
    first, second = value
    return _whole(first), _whole(second)


def _image(value: Any) -> Image.Image:
    if not isinstance(value, Image.Image):
        raise TypeError
    return value


def _truth(value: Any) -> bool:
    if type(value).__name__ not in ("bool", "bool_"):  # numpy's is not Python's
        raise TypeError
    return bool(value)


def _folder(value: Any) -> Path:
    if not isinstance(value, str | os.PathLike) or value == "":
        raise TypeError
    return Path(value)


WHOLE, REAL, TEXT = ("a whole number", _whole), ("a finite number", _real), ("a text", _text)
PAIR, IMAGE = ("two whole numbers", _pair), ("a PIL image", _image)
TRUTH = ("True or False", _truth)
KINDS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    **dict.fromkeys(("prompt", "negative_prompt", "sampler", "schedule", "resize", "safety"), TEXT),
    **dict.fromkeys(("steps", "seed", "width", "height", "batch", "count", "clip_skip", "mask_blur"), WHOLE),
    **dict.fromkeys(("guidance", "strength"), REAL),
    **dict.fromkeys(("original_size", "crop"), PAIR),
    **dict.fromkeys(("image", "mask"), IMAGE),
    "loras": ("a file, file:weight, (file, weight), or a list of these", as_loras),
    "lora_dir": ("a folder", _folder),
    "embeddings": ("a file, name=file, (name, file), or a list of these", as_embeddings),
    "controls": ("a Control, (file, picture), or a list of these", as_controls),
    "paste": TRUTH,
}


def kind_of(name: str) -> tuple[str, Callable[[Any], Any]] | None:
    """What a field takes, such as WHOLE; None for one that a request does not have."""
    return KINDS.get(name)
