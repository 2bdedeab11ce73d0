"""The settings that painted a picture, as the text that other tools read and write, and back again."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

import gguf_sd
from gguf_sd.adapters.embedding_files import short_hash as embedding_hash
from gguf_sd.adapters.lora import short_hash, tag_names
from gguf_sd.control import MAX_CONTROLS, ControlJob
from gguf_sd.errors import GgufSdError
from gguf_sd.imaging.images import check_size, open_image
from gguf_sd.imaging.infotext import compose, decompose, read_pairs
from gguf_sd.sampling.names import SAMPLERS

if TYPE_CHECKING:
    from gguf_sd.adapters.embeddings import Embedding
    from gguf_sd.pipeline import Picture
    from gguf_sd.request import Job

PARAMETERS = "parameters"  # the PNG text chunk
PROGRAM = "gguf-sd"
SCHEDULE_LABELS = {"model": "Automatic", "sgm_uniform": "SGM Uniform", "ays": "Align Your Steps"}
# What "Automatic" means to AUTOMATIC1111 where it is not the model's own schedule.
AUTOMATIC = dict.fromkeys(("DPM++ 2M", "DPM++ SDE", "DPM++ 2S a", "DPM2", "DPM2 a"), "karras")
AUTOMATIC |= dict.fromkeys(("DPM++ 2M SDE", "DPM++ 2M SDE Heun", "DPM++ 3M SDE"), "exponential")
EXIF_IFD, USER_COMMENT = 0x8769, 0x9286  # where JPEG and WebP keep the text


def version() -> str:
    """What the pictures that we write say of their origin."""
    return f"{PROGRAM} {gguf_sd.__version__}"


def parameters(
    picture: Picture, model: str, model_hash: str = "", dtype: str = "", vae: str = "", vae_hash: str = ""
) -> str:
    """The settings of a picture. ``model`` is the file's name without its suffix, ``model_hash`` the SHA-256 of the
    checkpoint it was made from; ``vae`` and ``vae_hash`` are another autoencoder's name and SHA-256."""
    job = picture.job
    size = (job.width, job.height)
    begun, masked = job.picture is not None, job.picture is not None and job.picture.mask is not None
    pairs = {
        "Steps": job.steps,
        "Sampler": SAMPLERS[job.sampler].label,
        "Schedule type": SCHEDULE_LABELS.get(job.schedule_name, job.schedule_name.capitalize()),
        "CFG scale": _shortest(job.guidance),
        "Seed": picture.seed,
        "Size": _times(size),
        "Model hash": model_hash[:10],
        "Model": model,
        "Lora hashes": _hashes({lora.name: short_hash(lora.path) for lora in job.loras}),
        "TI hashes": _hashes({x.names[0]: embedding_hash(x.path) for x in _used(job)}),
        "VAE hash": vae_hash[:10],
        "VAE": vae,
        "Clip skip": job.clip_skip,
        "Original size": _times(job.original_size) if job.original_size != size else None,
        "Crop": _times(job.crop) if job.crop != (0, 0) else None,
        "Denoising strength": None if job.strength is None else _shortest(job.strength),
        "Resize mode": job.resize if begun else None,
        "Mask blur": job.mask_blur if masked else None,
        "Paste original": job.paste if masked else None,
        **{f"ControlNet {i}": _control(control) for i, control in enumerate(job.controls)},
        "Precision": dtype,
        "Kernels": picture.kernels,
        "Version": version(),
    }
    return compose(_with_tags(job), job.negative_prompt, pairs)


def _control(control: ControlJob) -> str:
    """As AUTOMATIC1111's extension for ControlNets writes them, and the picture's name behind it."""
    name, digest = Path(control.file.name).stem, control.file.source_hash[:8]
    pairs = {
        "Module": "none",
        "Model": f"{name} [{digest}]" if digest else name,
        "Weight": _shortest(control.scale),
        "Guidance Start": _shortest(control.start),
        "Guidance End": _shortest(control.end),
        "Image": control.image_name,
    }
    return ", ".join(f"{key}: {re.sub('[,:]', '', value)}" for key, value in pairs.items() if value)


def _read_controls(pairs: dict[str, str]) -> list[dict[str, Any]]:
    """Model, hash, scale, start, end and image of each ControlNet. Raises ValueError for numbers that are none."""
    found = []
    for index in range(MAX_CONTROLS):
        if (text := pairs.get(f"ControlNet {index}")) is None:
            break
        own = read_pairs(text)
        name, _, digest = own.get("Model", "").partition(" [")
        numbers = {"scale": "Weight", "start": "Guidance Start", "end": "Guidance End"}
        values = {
            word: _value(key, own.get(key, "0" if word == "start" else "1"), _finite) for word, key in numbers.items()
        }
        found.append({"model": name, "hash": digest.rstrip("]"), "image": own.get("Image", ""), **values})
    return found


def _with_tags(job: Job) -> str:
    """The prompt with a tag for each LoRA, of those that it does not name itself behind it."""
    named = tag_names(job.prompt)
    return " ".join([job.prompt, *(lora.tag for lora in job.loras if lora.name not in named)]).lstrip(" ")


def _used(job: Job) -> list[Embedding]:
    from gguf_sd.adapters.embeddings import Words  # late: it imports torch

    return Words(job.embeddings).used(job.prompt, job.negative_prompt)


def _hashes(hashes: dict[str, str]) -> str:
    """AUTOMATIC1111's list of names with the beginnings of hashes."""
    return ", ".join(f"{re.sub('[:,]', '', name)}: {value}" for name, value in hashes.items())


def read_hashes(text: str) -> dict[str, str]:
    """Name -> beginning of its hash, from such a list."""
    pairs = (item.partition(":") for item in text.split(","))
    return {name.strip(): value.strip() for name, colon, value in pairs if colon}


def _shortest(number: float) -> str:
    """As few digits as give the same number again."""
    return repr(float(number)).removesuffix(".0")


def _times(pair: tuple[int, int]) -> str:
    return f"{pair[0]}x{pair[1]}"


def read_parameters(path: Path) -> dict[str, Any]:
    """The settings in a picture, see :func:`parse_parameters`. Raises GgufSdError where it has none, or none that make
    sense."""
    text = text_of(open_image(path))
    if not text.strip():
        raise GgufSdError(
            f"{path} carries no settings (no PNG text called {PARAMETERS!r}); was it saved by another program?"
        )
    try:
        return parse_parameters(text)
    except ValueError as error:
        raise GgufSdError(f"{path} carries settings that cannot be read: {error}") from error


def text_of(image: Image.Image) -> str:
    """PNG's text chunk, else the user comment of a JPEG's or WebP's EXIF data."""
    if isinstance(text := image.info.get(PARAMETERS), str):
        return text
    comment = image.getexif().get_ifd(EXIF_IFD).get(USER_COMMENT)
    if not isinstance(comment, bytes):
        return comment if isinstance(comment, str) else ""
    kind, body = comment[:8], comment[8:]
    return body.decode("utf-16-be" if kind == b"UNICODE\0" else "utf-8", errors="replace")


def parse_parameters(text: str) -> dict[str, Any]:
    """The settings in a text of AUTOMATIC1111's form: keywords of :class:`gguf_sd.request.Request`, where it has them.

    Sampler and schedule are as the text names them, ours or not. Besides: ``dtype`` and ``kernels`` of our own pictures
    (int8 or torch, where they say so), ``model``, ``model_hash``, ``vae``, ``vae_hash``,
    ``lora_hashes`` and ``embedding_hashes`` (see :func:`read_hashes`); ``masked`` is true where a mask was in use,
    ``controls_used`` lists ControlNets (see :func:`_read_controls`), ``hires`` is true where a larger picture was
    painted from a first one, whose settings these are. Raises ValueError for values of the wrong kind.
    """
    prompt, negative, pairs = decompose(text)
    ours = pairs.get("Version", "").startswith(PROGRAM)
    # Without the line, other programs encode an empty text.
    settings: dict[str, Any] = {"prompt": prompt, "negative_prompt": negative if ours else negative or ""}
    settings |= {name: pairs[key] for key, name in TEXTS.items() if key in pairs}
    for key, (name, kind) in NUMBERS.items():
        if key in pairs:
            settings[name] = _value(key, pairs[key], kind)
    if "Size" in pairs:
        settings["width"], settings["height"] = _value("Size", pairs["Size"], _pair)
    if settings.get("schedule", "").lower() == "automatic":
        settings["schedule"] = "model" if ours else AUTOMATIC.get(settings.get("sampler", ""), "model")
    if ours and "Resize mode" in pairs:  # others' words for it mean other things
        settings["resize"] = pairs["Resize mode"]
    if not ours:
        settings.pop("dtype", None)
    elif pairs.get("Kernels") in ("int8", "torch"):
        settings["kernels"] = pairs["Kernels"]
    if "Mask blur" in pairs:
        settings["masked"] = True
    if controls := _read_controls(pairs):
        settings["controls_used"] = controls
    return settings | _first_pass(pairs, settings)


def _first_pass(pairs: dict[str, str], settings: dict[str, Any]) -> dict[str, Any]:
    """AUTOMATIC1111's hires fix paints from the prompt first; the strength is that of the second pass."""
    if not any(key.startswith(("Hires ", "First pass")) for key in pairs):
        return {}
    settings.pop("strength", None)
    width, height = _value("First pass size", pairs.get("First pass size", "0x0"), _pair)  # of its older versions
    return {"hires": True} | ({"width": width, "height": height} if width and height else {})


def _value(key: str, text: str, kind: Any) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{key} is {text[:40]!r}") from None


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number


def _pair(text: str) -> tuple[int, int]:
    first, _, second = text.partition("x")
    return int(first), int(second)


def _truth(text: str) -> bool:
    if text not in ("True", "False"):
        raise ValueError(text)
    return text == "True"


TEXTS = {
    "Sampler": "sampler",
    "Schedule type": "schedule",
    "Precision": "dtype",
    "Model": "model",
    "Model hash": "model_hash",
    "VAE": "vae",
    "VAE hash": "vae_hash",
    "Lora hashes": "lora_hashes",
    "TI hashes": "embedding_hashes",
}
NUMBERS: dict[str, tuple[str, Any]] = {
    "Steps": ("steps", int),
    "CFG scale": ("guidance", _finite),
    "Seed": ("seed", int),
    "Clip skip": ("clip_skip", int),
    "Denoising strength": ("strength", _finite),
    "Original size": ("original_size", _pair),
    "Crop": ("crop", _pair),
    "Mask blur": ("mask_blur", int),
    "Paste original": ("paste", _truth),
}


def written_by_us(path: Path) -> bool:
    """Whether a file is a PNG that gguf-sd wrote, as its text says; the picture in it is not decoded."""
    if not path.is_file():
        return False
    try:
        with Image.open(path, formats=["PNG"]) as image:
            check_size(image, str(path))
            text = image.info.get(PARAMETERS)
    except Exception:  # whatever a stranger's file makes the decoder raise: it is not ours
        return False
    return isinstance(text, str) and read_pairs(text.rsplit("\n", 1)[-1]).get("Version", "").startswith(PROGRAM)
