"""The settings that painted a picture, as the text other tools read and write, and back again.

The format is AUTOMATIC1111's: the prompt, ``Negative prompt: …``, then one line of ``key: value`` pairs.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gguf_sd
from gguf_sd.errors import GgufSdError
from gguf_sd.imaging.images import open_image
from gguf_sd.pipeline import Picture
from gguf_sd.sampling.names import SAMPLERS, resolve_sampler

PARAMETERS = "parameters"  # the PNG text chunk
NEGATIVE = "Negative prompt: "
SCHEDULE_LABELS = {"model": "Automatic"}
PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


def parameters(picture: Picture, model: str, model_hash: str = "", dtype: str = "") -> str:
    """The settings of a picture. ``model`` is the file's name without its suffix, ``model_hash`` the SHA-256 of the
    checkpoint it was made from."""
    job = picture.job
    pairs = {
        "Steps": job.steps,
        "Sampler": SAMPLERS[job.sampler].label,
        "Schedule type": SCHEDULE_LABELS.get(job.schedule_name, job.schedule_name.capitalize()),
        "CFG scale": f"{job.guidance:g}",
        "Seed": picture.seed,
        "Size": f"{job.width}x{job.height}",
        "Model hash": model_hash[:10],
        "Model": _quoted(model),
        "Clip skip": job.clip_skip or "",
        "Denoising strength": "" if job.strength is None else f"{job.strength:g}",
        "Precision": dtype,
        "Version": f"gguf-sd {gguf_sd.__version__}",
    }
    lines = [job.prompt]
    if job.negative_prompt:
        lines.append(NEGATIVE + job.negative_prompt)
    lines.append(", ".join(f"{key}: {value}" for key, value in pairs.items() if value != ""))
    return "\n".join(lines)


def _quoted(value: str) -> str:
    """Values that hold a separator stand in double quotes, as JSON."""
    return json.dumps(value, ensure_ascii=False) if set(value) & set(',:\n"') else value


def read_parameters(path: Path) -> dict[str, Any]:
    """The settings in a PNG as keywords of :class:`gguf_sd.request.Request`, and ``dtype``, ``model`` and
    ``model_hash`` where they are given. Raises GgufSdError where the picture has none, or none that make sense."""
    text = open_image(path).info.get(PARAMETERS)
    if not isinstance(text, str) or not text.strip():
        raise GgufSdError(
            f"{path} carries no settings (no PNG text called {PARAMETERS!r}); was it saved by another program?"
        )
    try:
        return parse_parameters(text)
    except (ValueError, KeyError) as error:
        raise GgufSdError(f"{path} carries settings that cannot be read: {error}") from error


def parse_parameters(text: str) -> dict[str, Any]:
    """As :func:`read_parameters`, from the text. Raises ValueError or KeyError for values of the wrong kind."""
    *lines, last = text.strip().split("\n")
    pairs = dict(PAIR.findall(last))
    if "Steps" not in pairs:
        raise ValueError(f"its last line has no 'Steps': {last[:80]!r}")
    prompt, _, negative = "\n".join(lines).partition("\n" + NEGATIVE)
    if prompt.startswith(NEGATIVE):
        prompt, negative = "", prompt.removeprefix(NEGATIVE)
    settings: dict[str, Any] = {"prompt": prompt, "negative_prompt": negative, "steps": int(pairs["Steps"])}
    settings |= _numbers(pairs)
    if "Sampler" in pairs:
        settings["sampler"], schedule = resolve_sampler(pairs["Sampler"])
        label = pairs.get("Schedule type", schedule or "Automatic").lower()
        settings["schedule"] = "model" if label == "automatic" else label
    for key, name in (("Precision", "dtype"), ("Model", "model"), ("Model hash", "model_hash")):
        if key in pairs:
            value = pairs[key]
            settings[name] = json.loads(value) if value.startswith('"') else value
    return settings


def _numbers(pairs: dict[str, str]) -> dict[str, Any]:
    kinds = {
        "CFG scale": ("guidance", float),
        "Seed": ("seed", int),
        "Clip skip": ("clip_skip", int),
        "Denoising strength": ("strength", float),
    }
    numbers: dict[str, Any] = {name: kind(pairs[key]) for key, (name, kind) in kinds.items() if key in pairs}
    if "Size" in pairs:
        width, _, height = pairs["Size"].partition("x")
        numbers |= {"width": int(width), "height": int(height)}
    return numbers
