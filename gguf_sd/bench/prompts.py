"""What is painted where nobody says: for calibrations and comparisons."""

from __future__ import annotations

from pathlib import Path

from gguf_sd.demo.models import demo_model
from gguf_sd.errors import GgufSdError
from gguf_sd.input_files import open_input

MAX_BYTES, MAX_PROMPTS = 1 << 20, 10_000
DEMO_PROMPTS = 96

SUBJECTS = (
    "a mountain lake at dawn",
    "an old man with a pipe",
    "a tabby cat asleep on a windowsill",
    "a street market in the rain",
    "a bowl of oranges and a blue jug",
    "a red bicycle against a brick wall",
    "a castle above the clouds",
    "a portrait of a young woman in a green coat",
    "a steam locomotive on a viaduct",
    "an astronaut in a field of sunflowers",
    "a wooden cabin in deep snow",
    "a city skyline at night",
    "two dogs running on a beach",
    "a cup of coffee and an open book",
    "a forest path in autumn",
    "a robot repairing a clock",
)
MEDIA = ("a photograph of", "an oil painting of", "a watercolour of", "a pencil drawing of")


def default_prompts(source: Path) -> list[str]:
    """For a source: the built-in demo models know worlds of their own, of which these are scenes that training saw."""
    if (demo := demo_model(source)) is not None:
        return demo.prompts(DEMO_PROMPTS, seed=3, held=False)
    return [f"{MEDIA[(i + i // len(SUBJECTS)) % len(MEDIA)]} {s}" for i, s in enumerate(SUBJECTS * len(MEDIA))]


def read_prompts(path: Path) -> list[str]:
    """A text file's prompts, one a line; empty lines and those that begin with # are left out. Raises GgufSdError for
    a file that is none or is too long."""
    try:
        with open_input(path) as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise GgufSdError(f"cannot read {path}: {error.strerror}") from error
    if len(raw) > MAX_BYTES:
        raise GgufSdError(f"{path} has more than {MAX_BYTES} bytes; give a text file with a prompt a line")
    try:
        lines = [line.strip() for line in raw.decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise GgufSdError(f"{path} is no text in UTF-8: {error.reason} at byte {error.start}") from error
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise GgufSdError(f"{path} holds no prompt; give one a line")
    if len(prompts) > MAX_PROMPTS:
        raise GgufSdError(f"{path} holds {len(prompts)} prompts; at most {MAX_PROMPTS} are taken")
    return prompts
