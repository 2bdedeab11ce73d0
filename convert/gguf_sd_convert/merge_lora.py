"""LoRAs merged into a checkpoint's weights, in float32 and before anything is quantised."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from gguf_sd.adapters.lora import Active, Lora, active
from gguf_sd.adapters.lora_file import LayerChange
from gguf_sd.adapters.read_lora import change_factors, check_loras, lora_file
from gguf_sd.adapters.targets import UNET_PART, Target, text_part
from gguf_sd.checkpoint.tensor_names import OPENCLIP_LAYER, TEXT, UNET, XL_TEXT, inverted
from gguf_sd.config import ModelConfig
from gguf_sd_convert.sources.entries import Blocks, Entry

LEVEL = "text_model."


@dataclass(frozen=True)
class Place:
    """Where a layer's weight lies in an original checkpoint: a tensor, or a third of one."""

    name: str
    third: int | None = None
    transposed: bool = False


def merged(tensors: dict[str, Entry], loras: Iterable[Lora], config: ModelConfig) -> tuple[dict[str, Entry], list[str]]:
    """Entries by canonical name, those that LoRAs change in float32, and a sentence a LoRA. Raises GgufSdError for a
    LoRA that is not for this model, or damaged."""
    loras = list(loras)
    notes = check_loras(loras, config)
    changes: dict[str, list[tuple[Active, LayerChange, Place]]] = {}
    for lora in loras:
        count = 0
        for part in (UNET_PART, *(text_part(i) for i in range(len(config.text)))):
            for one in active([lora], part):
                own = [change for change in lora_file(one, config).changes if change.target.part == part]
                count += len(own)
                for change in own:
                    place = place_of(change.target, len(config.text))
                    changes.setdefault(place.name, []).append((one, change, place))
        notes.append(f"merged {lora.path} at {lora.weights} into {count} layers")
    changed = {
        name: replace(
            tensors[name], dtype=torch.float32, load=partial(_load, tensors[name], own), blocks=_changed(tensors[name])
        )
        for name, own in changes.items()
    }
    return tensors | changed, notes


def _changed(entry: Entry) -> Blocks | None:
    return replace(entry.blocks, read=None) if entry.blocks else None


def _load(entry: Entry, changes: Iterable[tuple[Active, LayerChange, Place]]) -> Tensor:
    weight = entry.load().float().reshape(entry.shape)
    for lora, change, place in changes:
        delta = change_factors(lora, change).delta(change.target.shape)
        into = weight if place.third is None else weight.chunk(3)[place.third]
        into += (delta.t() if place.transposed else delta).reshape(into.shape)
    return weight


def place_of(target: Target, texts: int) -> Place:
    """Where the layer's weight lies, in a model of so many text encoders."""
    module = target.module
    if target.part == UNET_PART:
        return Place(f"{UNET}{module}.weight")
    if target.part == text_part(0):
        return Place(f"{XL_TEXT[0] if texts > 1 else TEXT}{LEVEL}{module}.weight")
    if module == "text_projection":
        return Place(f"{XL_TEXT[1]}text_projection", transposed=True)
    _, _, index, layer = module.split(".", 3)
    block = f"{XL_TEXT[1]}transformer.resblocks.{index}."
    if layer in (names := inverted(OPENCLIP_LAYER)):
        return Place(f"{block}{names[layer]}.weight")
    return Place(f"{block}attn.in_proj_weight", third="qkv".index(layer.removeprefix("self_attn.")[0]))
