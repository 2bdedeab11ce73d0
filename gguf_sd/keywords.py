"""Settings as Python callers give them: numbers of numpy's, paths as strings, pictures or where they lie, lists of
prompts."""

from __future__ import annotations

import difflib
import operator
import os
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

from PIL import Image

from gguf_sd.errors import GgufSdError
from gguf_sd.imaging.images import open_image
from gguf_sd.request import MAX_SEED, Job, Request

CHECKPOINTS = {".safetensors", ".ckpt", ".pt", ".pth", ".bin"}
# What other libraries call our settings.
ELSEWHERE = {
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "cfg_scale": "guidance",
    "num_images_per_prompt": "count",
    "n_iter": "count",
    "batch_size": "batch",
    "generator": "seed",
    "scheduler": "sampler, and schedule",
    "sampler_name": "sampler",
    "init_image": "image",
    "mask_image": "mask",
    "denoising_strength": "strength",
    "crops_coords_top_left": "crop",
    "prompts": "prompt",
}


def path(name: str, value: Any) -> Path:
    """A path, from a string or a path. Raises GgufSdError, with the setting's ``name``, for anything else."""
    if not isinstance(value, str | os.PathLike) or value == "":
        raise GgufSdError(f"{name} takes a path, got {value!r}")
    return Path(value)


def gguf_path(value: Any) -> Path:
    """The path of a model to open. Raises GgufSdError for what is to be converted first."""
    model = path("the model", value)
    if model.is_dir() or (model.is_file() and model.suffix.lower() in CHECKPOINTS):
        raise GgufSdError(
            f"{model} is no GGUF file; convert it first, with gguf_sd.convert({str(model)!r}, 'model.gguf') or "
            "gguf-sd convert"
        )
    return model


def requests(prompt: str | Sequence[str], settings: Mapping[str, Any]) -> list[Request]:
    """A request for each prompt. Raises GgufSdError for an unknown setting, naming those that are near, and for values
    of the wrong kind."""
    check_known(settings, list(_HINTS))
    shared = {name: value for name, value in settings.items() if name not in ("prompt", "negative_prompt")}
    prompts = _texts("prompt", prompt)
    negatives = _texts("negative_prompt", settings.get("negative_prompt"))
    if len(negatives) == 1 and not _listed(settings.get("negative_prompt")):
        negatives *= len(prompts)
    if len(negatives) != len(prompts):
        raise GgufSdError(
            f"negative_prompt has {len(negatives)} texts for {len(prompts)} prompts; give one for each, or one for all"
        )
    first = plain(Request(**shared))
    return [replace(first, prompt=a or "", negative_prompt=b) for a, b in zip(prompts, negatives, strict=True)]


def counted_up(first: Job, requests: Sequence[Request]) -> list[Job]:
    """The jobs of requests that differ in their prompts alone, from that of the first: seeds go on from job to job."""
    return [
        replace(
            first,
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            seed=(first.seed + i * first.count) % (MAX_SEED + 1),
        )
        for i, request in enumerate(requests)
    ]


def plain(request: Request) -> Request:
    """The request in Python's own types, None where it stands for a default replaced by it."""
    values = {f.name: getattr(request, f.name) for f in fields(Request)}
    defaults = {f.name: f.default for f in fields(Request) if f.default is not MISSING}
    converted: dict[str, Any] = {
        name: defaults.get(name) if value is None else _converted(name, value, _HINTS[name])
        for name, value in values.items()
    }
    return Request(**converted)


def check_known(settings: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raises GgufSdError for a name that is not known, with those that are near."""
    for name in settings:
        if name not in known:
            raise GgufSdError(f"there is no setting {name!r}; {_near(name, known)}")


def _near(unknown: str, known: Sequence[str]) -> str:
    if ELSEWHERE.get(unknown, "").partition(",")[0] in known:
        return f"here it is called {ELSEWHERE[unknown]}"
    near = difflib.get_close_matches(unknown, known, n=3)
    return f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(known)}"


def _listed(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _texts(name: str, value: Any) -> list[str | None]:
    texts = list(value) if _listed(value) else [value]
    if not texts:
        raise GgufSdError(f"{name} is an empty list; give at least one text")
    for text in texts:
        if not isinstance(text, str) and text is not None:
            raise GgufSdError(f"{name} takes a text, or a list of texts, got {text!r}")
    return texts


def _converted(name: str, value: Any, hint: Any) -> Any:
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kind = next(kind for kind in kinds if kind is not type(None))
    if typing.get_origin(kind) is tuple:
        if not _listed(value) or len(value) != len(typing.get_args(kind)):
            raise GgufSdError(f"{name} takes {len(typing.get_args(kind))} numbers, got {value!r}")
        pairs = zip(value, typing.get_args(kind), strict=True)
        return tuple(_converted(name, item, part) for item, part in pairs)
    converters = {int: _whole, float: _number, str: _text, bool: _truth, Image.Image: _picture}
    return converters[kind](name, value) if kind in converters else value


def _whole(name: str, value: Any) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise GgufSdError(f"{name} takes a whole number, got {value!r}") from None


def _number(name: str, value: Any) -> float:
    try:
        if isinstance(value, str | bytes | bool):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise GgufSdError(f"{name} takes a number, got {value!r}") from None


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise GgufSdError(f"{name} takes a text, got {value!r}")
    return value


def _truth(name: str, value: Any) -> bool:
    try:
        return bool(operator.index(value))  # Python's and numpy's
    except TypeError:
        if type(value).__name__ in ("bool", "bool_"):  # numpy's has no index
            return bool(value)
        raise GgufSdError(f"{name} takes True or False, got {value!r}") from None


def _picture(name: str, value: Any) -> Image.Image:
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, str | os.PathLike):
        return open_image(Path(value))
    raise GgufSdError(f"{name} takes a PIL image or a path, got {type(value).__name__}")


_HINTS = typing.get_type_hints(Request)
