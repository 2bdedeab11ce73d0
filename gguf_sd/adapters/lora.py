"""Which LoRAs are asked for: files with weights, and ``<lora:name:weight>`` in a prompt as AUTOMATIC1111 has it."""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from gguf_sd.errors import GgufSdError
from gguf_sd.field_checks import shown

TAG = re.compile(r"<(?:lora|lyco):([^<>:]+)((?::[^<>:]*)*)>")
MAX_WEIGHT = 100.0
MAX_LORAS = 100
MAX_FOLDER = 100_000  # files of a folder that is searched for names
SUFFIX = ".safetensors"
SHORT_HASH = 12  # characters that AUTOMATIC1111 records


@dataclass(frozen=True)
class Lora:
    """A file and how much of it is added. ``text_weight`` is for the text encoders; None: as for the UNet."""

    path: Path
    weight: float = 1.0
    text_weight: float | None = None

    @property
    def name(self) -> str:
        """What a prompt calls it."""
        return self.path.stem

    @property
    def stamp(self) -> tuple[int, int]:
        """Time and size of the file, which tell one from its successor. Raises GgufSdError where it is gone."""
        try:
            stat = self.path.stat()
        except OSError as error:
            raise GgufSdError(f"cannot read the LoRA {self.path}: {error.strerror}") from error
        return stat.st_mtime_ns, stat.st_size

    @property
    def weights(self) -> str:
        """As they stand in a prompt: one, or the text encoders' and the UNet's."""
        pair = [self.weight] if self.text_weight in (None, self.weight) else [self.text_weight, self.weight]
        return ":".join(_shortest(weight) for weight in pair if weight is not None)

    @property
    def tag(self) -> str:
        return f"<lora:{self.name}:{self.weights}>"

    def __str__(self) -> str:
        return f"{self.path}:{self.weights}"


class Active(NamedTuple):
    """What a part of the model is loaded with: a file as it was when it was looked at, and its weight for that part."""

    path: Path
    stamp: tuple[int, int]
    weight: float


def active(loras: Iterable[Lora], part: str) -> tuple[Active, ...]:
    """The LoRAs that change a part, unet, text 0 or text 1: those whose weight for it is not 0."""
    weights = ((x, x.weight if part == "unet" or x.text_weight is None else x.text_weight) for x in loras)
    return tuple(Active(lora.path, lora.stamp, weight) for lora, weight in weights if weight)


def _shortest(number: float) -> str:
    return repr(float(number)).removesuffix(".0")


def as_loras(value: Any) -> tuple[Lora, ...]:
    """What a caller gives: one, or a list of, LoRA, path, ``file[:weight]`` and (path, weight). Raises TypeError for
    anything else, GgufSdError for weights that cannot be."""
    pair = isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], int | float)
    if pair or isinstance(value, Lora | str | os.PathLike):
        value = [value]
    return tuple(_as_lora(item) for item in value)


def _as_lora(item: Any) -> Lora:
    if isinstance(item, str):
        return parse_lora(item)
    if isinstance(item, os.PathLike):
        return Lora(Path(item))
    if isinstance(item, Lora):
        path, weights = item.path, [item.weight, *([] if item.text_weight is None else [item.text_weight])]
        return Lora(Path(path), *(_checked_weight(weight, str(path)) for weight in weights))
    path, weight = item
    if not isinstance(path, str | os.PathLike):
        raise TypeError
    return Lora(Path(path), _checked_weight(weight, str(path)))


def parse_lora(text: str) -> Lora:
    """``file``, ``file:weight`` or ``file:text weight:UNet weight``. Raises GgufSdError for a weight that is no number,
    or a huge one."""
    if Path(text).is_file():  # whatever colons are in its name
        return Lora(Path(text))
    head, dot, tail = text.rpartition(SUFFIX)
    path, colon, weights = (head + dot, tail[:1], tail[1:]) if dot else text.partition(":")
    if not path or (weights and colon != ":"):
        raise GgufSdError(f"no LoRA {shown(text)}; give file.safetensors or file.safetensors:weight")
    return _weighted(Path(path), weights.split(":") if colon else [], text)


def _weighted(path: Path, weights: list[str], text: str) -> Lora:
    """A LoRA with its weights as AUTOMATIC1111 orders them: one, or the text encoders' before the UNet's."""
    if len(weights) > 2:
        raise GgufSdError(
            f"{shown(text)} has {len(weights)} weights; it takes one, or the text encoders' and the UNet's"
        )
    numbers = [_checked_weight(weight, text) for weight in weights]
    if len(numbers) == 2:
        return Lora(path, numbers[1], numbers[0])
    return Lora(path, *numbers)


def parse_weights(path: Path, text: str) -> Lora:
    """A LoRA with the weights that stand behind its name in a tag, ``:0.8``, ``:0.8:1`` or nothing."""
    return _weighted(path, text.split(":")[1:], f"{path.stem}{text}")


def _checked_weight(weight: Any, where: str) -> float:
    try:
        number = float(weight)
    except (TypeError, ValueError):
        number = math.nan
    if not abs(number) <= MAX_WEIGHT:
        raise GgufSdError(
            f"the weight of the LoRA {shown(where)} is {shown(weight)}; it takes a number from {-MAX_WEIGHT:g} "
            f"to {MAX_WEIGHT:g}"
        )
    return number


def without_tags(prompt: str) -> str:
    """The prompt as the text encoders read it."""
    return TAG.sub("", prompt)


def tag_names(prompt: str) -> list[str]:
    """Names of the LoRAs that a prompt asks for."""
    return [match[1].strip() for match in TAG.finditer(prompt)]


def requested(loras: Iterable[Lora], prompt: str, folder: Path | None) -> tuple[Lora, ...]:
    """Those given, then those that the prompt names, which are looked for in ``folder`` and below. Raises GgufSdError
    for one that is not found, and one that is named twice."""
    found = [*loras, *_tagged(prompt, folder)]
    if len(found) > MAX_LORAS:
        raise GgufSdError(f"{len(found)} LoRAs are given; at most {MAX_LORAS} are taken")
    seen: dict[str, Lora] = {}
    for lora in found:
        if other := seen.get(lora.name):
            both = f"{other.path}" if other.path == lora.path else f"{other.path} and {lora.path}"
            raise GgufSdError(
                f"the LoRA {lora.name} is given twice ({both}); give it once, with the weight it should have"
            )
        seen[lora.name] = lora
    return tuple(found)


def _tagged(prompt: str, folder: Path | None) -> Iterator[Lora]:
    matches = list(TAG.finditer(prompt))
    files = _files(folder) if matches and folder is not None else {}
    for match in matches:
        name, tag = match[1].strip(), shown(match[0].strip())
        if folder is None:
            raise GgufSdError(f"{tag} in the prompt names a LoRA; say with --lora-dir in which folder it is")
        paths = files.get(name.removesuffix(SUFFIX), [])
        if not paths:
            raise GgufSdError(f"{tag} in the prompt: there is no {name.removesuffix(SUFFIX)}{SUFFIX} in {folder}")
        if len(paths) > 1:
            raise GgufSdError(f"{tag} in the prompt may be {paths[0]} or {paths[1]}; give one of them with --lora")
        yield parse_weights(paths[0], match[2])


def _files(folder: Path) -> dict[str, list[Path]]:
    """Files in a folder and below, by name and by path without suffix: what a prompt names leads nowhere else."""
    if not folder.is_dir():
        raise GgufSdError(f"the folder of LoRAs {folder} does not exist")
    found: dict[str, list[Path]] = {}
    for count, path in enumerate(sorted(folder.rglob(f"*{SUFFIX}"))):
        if count == MAX_FOLDER:
            raise GgufSdError(f"{folder} holds more than {MAX_FOLDER} LoRAs; give a smaller folder with --lora-dir")
        for name in {path.stem, path.relative_to(folder).with_suffix("").as_posix()}:
            found.setdefault(name, []).append(path)
    return found


def short_hash(path: Path) -> str:
    """The start of the SHA-256 of what lies behind a LoRA's header ("AutoV3"), as AUTOMATIC1111 and Civitai name it."""
    return _short_hash(path, Lora(path).stamp)


@lru_cache(maxsize=MAX_LORAS)
def _short_hash(path: Path, stamp: tuple[int, int]) -> str:
    with open(path, "rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
        return digest.hexdigest()[:SHORT_HASH]
