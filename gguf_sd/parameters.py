"""The settings that painted a picture, as the text other tools read."""

from __future__ import annotations

import gguf_sd
from gguf_sd.pipeline import Picture
from gguf_sd.sampling.names import SAMPLERS

PARAMETERS = "parameters"  # the PNG text chunk that AUTOMATIC1111's web UI writes and others read
SCHEDULE_LABELS = {"model": "Automatic"}


def parameters(picture: Picture, model: str, model_hash: str = "", dtype: str = "") -> str:
    """The settings of a picture in AUTOMATIC1111's format: prompt, negative prompt, then one line of key: value
    pairs. ``model`` is the file's name without its suffix, ``model_hash`` the start of the source's SHA-256."""
    job = picture.job
    pairs = {
        "Steps": job.steps,
        "Sampler": SAMPLERS[job.sampler].label,
        "Schedule type": SCHEDULE_LABELS.get(job.schedule_name, job.schedule_name.capitalize()),
        "CFG scale": f"{job.guidance:g}",
        "Seed": picture.seed,
        "Size": f"{job.width}x{job.height}",
        "Model hash": model_hash,
        "Model": _quoted(model),
        "Denoising strength": "" if job.strength is None else f"{job.strength:g}",
        "Precision": dtype,
        "Version": f"gguf-sd {gguf_sd.__version__}",
    }
    lines = [job.prompt]
    if job.negative_prompt:
        lines.append(f"Negative prompt: {job.negative_prompt}")
    lines.append(", ".join(f"{key}: {value}" for key, value in pairs.items() if value != ""))
    return "\n".join(lines)


def _quoted(value: str) -> str:
    """Values that hold a separator stand in double quotes."""
    if not set(value) & set(',:\n"'):
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
