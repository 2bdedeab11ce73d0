"""Which ControlNets are asked for: files, each with a picture and how much it has to say."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image

from gguf_sd.errors import GgufSdError
from gguf_sd.field_checks import shown
from gguf_sd.imaging import images

if TYPE_CHECKING:
    from gguf_sd.checkpoint.control_file import ControlFile
    from gguf_sd.config import ModelConfig

MAX_SCALE = 100.0
MAX_CONTROLS = 8
StrPath = str | os.PathLike[str]


@dataclass(frozen=True)
class Control:
    """A ControlNet's GGUF file, the picture that it sees (edges, depths, a pose: as the net was trained), or where that
    lies, and how much of what it says is added, from which share of the steps to which."""

    path: StrPath
    image: Image.Image | StrPath
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0

    @property
    def image_name(self) -> str:
        """The picture's file, where it came from one."""
        return "" if isinstance(self.image, Image.Image) else Path(self.image).name

    def picture(self) -> Image.Image:
        """Raises GgufSdError where it cannot be read."""
        return self.image if isinstance(self.image, Image.Image) else images.open_image(Path(self.image))


class ControlJob(NamedTuple):
    """A checked Control: ``picture`` at the size to paint."""

    file: ControlFile
    picture: Image.Image
    scale: float
    start: float
    end: float
    image_name: str


def control_jobs(
    controls: Iterable[Control],
    pictures: Iterable[Image.Image],
    size: tuple[int, int],
    resize: str,
    config: ModelConfig,
) -> tuple[ControlJob, ...]:
    """Controls against a model, with their pictures brought to the size to paint (width, height). Raises GgufSdError
    for files that are no ControlNets, or none for this model."""
    from gguf_sd.checkpoint.control_file import ControlFile

    jobs = []
    for control, picture in zip(controls, pictures, strict=True):
        file = ControlFile.open(Path(control.path))
        file.check_fits(config)
        fitted = images.resized(images.to_rgb(picture), *size, resize)
        jobs.append(ControlJob(file, fitted, control.scale, control.start, control.end, control.image_name))
    return tuple(jobs)


def as_controls(value: Any) -> tuple[Control, ...]:
    """What a caller gives: one, or a list of, Control and (file, picture). Raises TypeError for anything else,
    GgufSdError for numbers that cannot be."""
    pair = isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str | os.PathLike)
    if pair or isinstance(value, Control):
        value = [value]
    if not isinstance(value, Iterable) or isinstance(value, str):
        raise TypeError
    controls = tuple(_as_control(item) for item in value)
    if len(controls) > MAX_CONTROLS:
        raise GgufSdError(f"{len(controls)} ControlNets are given; at most {MAX_CONTROLS} are taken")
    return controls


def _as_control(item: Any) -> Control:
    control = item if isinstance(item, Control) else Control(*_pair(item))
    if not isinstance(control.path, str | os.PathLike) or not isinstance(
        control.image, Image.Image | str | os.PathLike
    ):
        raise TypeError
    path = Path(control.path)
    scale = _checked(control.scale, MAX_SCALE, f"the scale of the ControlNet {path}")
    start = _checked(control.start, 1.0, f"the start of the ControlNet {path}")
    end = _checked(control.end, 1.0, f"the end of the ControlNet {path}")
    if start >= end:
        raise GgufSdError(f"the ControlNet {path} starts at {start:g} and ends at {end:g}; the end must be greater")
    return Control(path, control.image, scale, start, end)


def _pair(item: Any) -> tuple[Any, Any]:
    path, image = item
    return path, image


def _checked(value: Any, most: float, what: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number <= most:
        raise GgufSdError(f"{what} is {shown(value)}; it takes a number from 0 to {most:g}")
    return number
