"""Pictures on disk, with the settings that painted them as the text other tools read."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from PIL.PngImagePlugin import PngInfo

import gguf_sd
from gguf_sd.errors import GgufSdError
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


def save(picture: Picture, path: Path, text: str) -> None:
    """Writes a PNG atomically. Raises GgufSdError where that cannot be done."""
    info = PngInfo()
    info.add_itxt(PARAMETERS, text) if not text.isascii() else info.add_text(PARAMETERS, text)
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            picture.image.save(file, format="PNG", pnginfo=info)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        raise GgufSdError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
