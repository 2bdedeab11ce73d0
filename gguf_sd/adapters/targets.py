"""The layers of a model that a LoRA may name, under each of the names that trainers give them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from gguf_sd.checkpoint import inventory
from gguf_sd.checkpoint.check_tensors import squeezed
from gguf_sd.checkpoint.tensor_names import inverted, rename, unet_modules
from gguf_sd.config import ModelConfig, TextConfig, UNetConfig

UNET_PART = "unet"
WEIGHT = ".weight"
TEXT_LEVEL = "text_model."


@dataclass(frozen=True)
class Target:
    """A linear or a convolution."""

    part: str  # unet, text 0 or text 1, as in gguf_sd.runtime.parts
    module: str  # its path in that part
    shape: tuple[int, ...]  # of its weight: [out, in], or [out, in, kh, kw] where the kernel is larger than 1x1


def text_part(index: int) -> str:
    return f"text {index}"


@lru_cache(maxsize=4)
def targets(config: ModelConfig) -> dict[tuple[str, str], Target]:
    """(part, path with underscores for dots) -> layer: original and diffusers' paths of the UNet's, transformers' with
    and without ``text_model_`` of the text encoders'."""
    found: dict[tuple[str, str], Target] = {}
    for target, names in _all(config):
        found |= {(target.part, name.replace(".", "_")): target for name in names}
    return found


def _all(config: ModelConfig) -> Iterator[tuple[Target, tuple[str, ...]]]:
    yield from _unet(config.unet)
    for index, text in enumerate(config.text):
        yield from _text(text, text_part(index))


def _unet(config: UNetConfig) -> Iterator[tuple[Target, tuple[str, ...]]]:
    modules = inverted(unet_modules(config))
    for name, shape in inventory.unet(config):
        if name.endswith(WEIGHT) and len(shape) > 1:
            module, diffusers = name.removesuffix(WEIGHT), rename(name, modules) or name
            yield Target(UNET_PART, module, squeezed(shape)), (module, diffusers.removesuffix(WEIGHT))


def _text(config: TextConfig, part: str) -> Iterator[tuple[Target, tuple[str, ...]]]:
    for name, shape in inventory.clip_text(config):
        module = name.removesuffix(WEIGHT).removeprefix(TEXT_LEVEL)
        if name.endswith(WEIGHT) and len(shape) > 1 and not module.startswith("embeddings."):
            yield Target(part, module, shape), (module, TEXT_LEVEL + module)
