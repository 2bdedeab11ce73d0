"""Settings as Python callers give them: keywords, paths as strings, pictures or where they lie, lists of prompts."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from gguf_sd.checkpoint.hub_names import hub_name
from gguf_sd.errors import GgufSdError
from gguf_sd.field_checks import shown
from gguf_sd.imaging.images import open_image
from gguf_sd.request import MAX_SEED, Job, Request, requested_loras

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
        raise GgufSdError(f"{name} takes a path, got {shown(value)}")
    return Path(value)


def hub_path(name: str, value: Any) -> Path:
    """As :func:`path`, of what lies on the disk or, fetched now, on the Hub."""
    given = path(name, value)
    if hub_name(given) is None:
        return given
    from gguf_sd.checkpoint.hub import fetched

    return fetched(given)


def gguf_path(value: Any) -> Path:
    """The path of a model to open; what lies on the Hub is fetched, see :func:`gguf_sd.checkpoint.hub.fetched`. Raises
    GgufSdError for what is to be converted first."""
    model = hub_path("the model", value)
    if model.is_dir() or (model.is_file() and model.suffix.lower() in CHECKPOINTS):
        raise GgufSdError(
            f"{model} is no GGUF file; convert it first, with gguf_sd.convert({str(model)!r}, 'model.gguf') or "
            "gguf-sd convert"
        )
    return model


def requests(prompt: str | Sequence[str], settings: Mapping[str, Any]) -> list[Request]:
    """A request for each prompt. Raises GgufSdError for an unknown setting, naming those that are near, and for
    prompts that are no text."""
    check_known(settings, [field.name for field in fields(Request)])
    shared = {name: value for name, value in settings.items() if name not in ("prompt", "negative_prompt")}
    prompts = _texts("prompt", prompt)
    negatives = _texts("negative_prompt", settings.get("negative_prompt"))
    if len(negatives) == 1 and not _listed(settings.get("negative_prompt")):
        negatives *= len(prompts)
    if len(negatives) != len(prompts):
        raise GgufSdError(
            f"negative_prompt has {len(negatives)} texts for {len(prompts)} prompts; give one for each, or one for all"
        )
    first = with_pictures(Request(**shared))
    return [replace(first, prompt=a or "", negative_prompt=b) for a, b in zip(prompts, negatives, strict=True)]


def counted_up(first: Job, requests: Sequence[Request]) -> list[Job]:
    """The jobs of requests that differ in their prompts alone, from that of the first: seeds go on from job to job."""
    return [
        replace(
            first,
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            loras=requested_loras(request),
            seed=(first.seed + i * first.count) % (MAX_SEED + 1),
        )
        for i, request in enumerate(requests)
    ]


def with_pictures(request: Request) -> Request:
    """The request with the pictures that its paths lead to."""
    opened: dict[str, Any] = {
        name: open_image(Path(value))
        for name in ("image", "mask")
        if isinstance(value := getattr(request, name), str | os.PathLike)
    }
    return replace(request, **opened)


def check_known(settings: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raises GgufSdError for a name that is not known, with those that are near."""
    for name in settings:
        if name not in known:
            raise GgufSdError(f"there is no setting {shown(name)}; {_near(name, known)}")


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
            raise GgufSdError(f"{name} takes a text, or a list of texts, got {shown(text)}")
    return texts
