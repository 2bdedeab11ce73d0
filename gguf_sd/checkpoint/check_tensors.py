"""A file's tensors against those that its configuration implies, before any module is built.

The work is bounded by the number of tensors in the file, whatever the configuration claims.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

from gguf_sd.checkpoint import inventory
from gguf_sd.checkpoint.inventory import Shape, Tensors
from gguf_sd.checkpoint.tensor_names import SAFETY, TEXT, UNET, VAE
from gguf_sd.config import ModelConfig
from gguf_sd.errors import GgufSdError

XL_TEXTS = ("conditioner.embedders.0.", "conditioner.embedders.1.")
# The second encoder is OpenCLIP's ("model."), or transformers' in the files of other tools.
XL_WRAPPER = re.compile(r"^(model|transformer(?=\.text_))\.")
NAMED = 3  # names of tensors that a message gives
TEXT_LEVEL, VISION_LEVEL = "text_model.", "vision_model."

log = logging.getLogger(__name__)


def text_names(names: Mapping[str, object], texts: int, index: int) -> dict[str, str]:
    """The tensors of text encoder ``index`` of ``texts``: names as in transformers or OpenCLIP -> canonical names."""
    prefix = TEXT if texts == 1 else XL_TEXTS[index]
    own = {name.removeprefix(prefix): name for name in names if name.startswith(prefix)}
    return own if texts == 1 else {XL_WRAPPER.sub("", local): name for local, name in own.items()}


def check_tensors(config: ModelConfig, shapes: Mapping[str, Shape], where: str) -> list[str]:
    """Compares shapes by canonical name (torch order) with the configuration; a part that is not there at all may be
    missing, one that is must be whole. Returns the names that belong to no part.

    Raises GgufSdError, naming the tensor and the file (``where``), for those that are missing or wrongly shaped.
    """
    known: set[str] = set()
    for names, expected in _parts(config, shapes):
        known |= check_part(names, expected, shapes, where)
    return [name for name in shapes if name not in known]


def _parts(config: ModelConfig, shapes: Mapping[str, Shape]) -> Iterator[tuple[dict[str, str], Tensors]]:
    """For each part: its tensors in the file, name inside the part -> canonical name, and those it takes."""
    yield _under(UNET, shapes), inventory.unet(config.unet)
    yield _under(VAE, shapes), inventory.vae(config.vae)
    for index, text in enumerate(config.text):
        names = text_names(shapes, len(config.text), index)
        if "positional_embedding" in names:
            yield names, inventory.openclip_text(text)
        else:
            names = {local.removeprefix(TEXT_LEVEL): name for local, name in names.items()}
            yield names, ((name.removeprefix(TEXT_LEVEL), shape) for name, shape in inventory.clip_text(text))
    if config.safety:  # transformers 4 puts one more vision_model. in front than 5 does
        names = {_one_level(local): name for local, name in _under(SAFETY, shapes).items()}
        yield names, ((_one_level(name), shape) for name, shape in inventory.safety(config.safety))


def _under(prefix: str, shapes: Mapping[str, Shape]) -> dict[str, str]:
    return {name.removeprefix(prefix): name for name in shapes if name.startswith(prefix)}


def _one_level(name: str) -> str:
    return name.replace(VISION_LEVEL * 2, VISION_LEVEL, 1)


def check_part(names: Mapping[str, str], expected: Tensors, shapes: Mapping[str, Shape], where: str) -> set[str]:
    """Compares a part, by name inside it -> canonical name, with the tensors it takes; returns the canonical names of
    those, none where the part is not there at all. Raises GgufSdError as :func:`check_tensors`."""
    most = 2 * len(names)
    drawn = list(islice(expected, most))
    missing = [name for name, _ in drawn if name not in names]
    if len(missing) == len(drawn):
        return set()
    if missing:
        prefix = _prefix(names)
        least = "at least " if len(drawn) == most else ""
        raise GgufSdError(
            f"{where} lacks {least}{len(missing)} of {least}{len(drawn)} tensors, the first is {prefix}{missing[0]}; "
            "it is incomplete, or not what its configuration says: download or convert it again"
        )
    for name, shape in drawn:
        got = shapes[names[name]]
        if squeezed(got) != squeezed(shape):
            raise GgufSdError(
                f"{where}: tensor {names[name]} has shape {list(got)} where the model takes {list(shape)}"
            )
    return {names[name] for name, _ in drawn}


def _prefix(names: Mapping[str, str]) -> str:
    local, canonical = next(iter(names.items()))
    return canonical.removesuffix(local)


def squeezed(shape: Shape) -> Shape:
    """1x1 convolutions may lie as matrices and the other way round."""
    return shape[:2] if len(shape) == 4 and shape[2:] == (1, 1) else shape


def warn_of_strays(names: Sequence[str], where: str) -> None:
    """One line on tensors that no part of the model takes; none where there are none."""
    if names:
        log.warning("%s", strays_note(names, where))


def strays_note(names: Sequence[str], where: str) -> str:
    """Which tensors do not belong, as a sentence."""
    listed = ", ".join(names[:NAMED]) + (", …" if len(names) > NAMED else "")
    if len(names) == 1:
        return f"{where} holds a tensor that does not belong and is left out: {listed}"
    return f"{where} holds {len(names)} tensors that do not belong and are left out: {listed}"
