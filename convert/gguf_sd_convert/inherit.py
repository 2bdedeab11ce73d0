"""Metadata that a file takes from what it is made of: where its weights come from, what was merged into them, and the
shapes of tensors that lie reshaped."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from gguf_sd.adapters.lora import Lora, short_hash
from gguf_sd.checkpoint import metadata_keys as keys
from gguf_sd_convert.quantize.policy import Stored
from gguf_sd_convert.sources.source import Source


def known_hash(source: Source, loras: Sequence[Lora] = ()) -> str:
    """SHA-256 of the checkpoint that a GGUF source was made from, where it says so and no ``loras`` change the weights;
    else empty."""
    said = source.said.get(keys.SOURCE_HASH)
    return said if isinstance(said, str) and re.fullmatch("[0-9a-f]{64}", said) and not loras else ""


def inherited(source: Source, loras: Sequence[Lora] = ()) -> dict[str, Any]:
    """What a GGUF source says of its own source, and the LoRAs in its weights with those that are merged now."""
    metadata: dict[str, Any] = {}
    if known_hash(source, loras):
        metadata[keys.SOURCE_NAME] = str(source.said.get(keys.SOURCE_NAME, source.path.name))
    before = _loras_of(source)
    if before or loras:
        new = [[lora.name, lora.weights, short_hash(lora.path)] for lora in loras]
        metadata[keys.LORAS] = json.dumps([*before, *new])
    return metadata


def _loras_of(source: Source) -> list[Any]:
    try:
        said = json.loads(source.said.get(keys.LORAS, "[]"))
    except (TypeError, ValueError, RecursionError):
        return []
    return said if isinstance(said, list) else []


def shape_keys(stored: Iterable[Stored], layout: str) -> dict[str, Any]:
    """The shapes of tensors that lie reshaped: our key for blocks tap by tap, ComfyUI-GGUF's for all others."""
    reshaped = [tensor for tensor in stored if tensor.reshaped]
    metadata: dict[str, Any] = {
        keys.COMFY_SHAPE + tensor.name: list(tensor.logical) for tensor in reshaped if not tensor.tap_major
    }
    if layout == "native":
        metadata[keys.SHAPES] = json.dumps({t.name: list(t.logical) for t in reshaped if t.tap_major})
    return metadata
