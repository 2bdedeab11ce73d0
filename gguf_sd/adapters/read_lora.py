"""The weights of LoRA files, a layer at a time, each checked before it is used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from gguf_sd.adapters.factors import Factors, factors
from gguf_sd.adapters.lora import Active, Lora, active
from gguf_sd.adapters.lora_file import LayerChange, LoraFile
from gguf_sd.adapters.targets import Target
from gguf_sd.checkpoint.finite import is_finite
from gguf_sd.config import ModelConfig
from gguf_sd.errors import GgufSdError
from gguf_sd.field_checks import called

MAX_ALPHA = 1e6


@lru_cache(maxsize=128)
def _opened(path: Path, stamp: tuple[int, int], config: ModelConfig) -> LoraFile:
    return LoraFile.open(path, config)


def lora_file(lora: Active, config: ModelConfig) -> LoraFile:
    """As :meth:`LoraFile.open`; what was found before is kept, as long as the file is the same."""
    return _opened(lora.path, lora.stamp, config)


@lru_cache(maxsize=128)
def _checked(path: Path, stamp: tuple[int, int], config: ModelConfig) -> None:
    file = _opened(path, stamp, config)
    for change, tensors in _read(path, file.changes):
        alpha = tensors.get("alpha")
        if alpha is not None and not abs(alpha.item()) <= MAX_ALPHA:
            key = change.tensors["alpha"]
            raise GgufSdError(f"{path}: tensor {key} is {alpha.item():g}; alpha is at most {MAX_ALPHA:g}")


def check_loras(loras: Iterable[Lora], config: ModelConfig) -> list[str]:
    """Reads all values once; raises GgufSdError for a file that is not for this model or holds NaN or infinity. Returns
    a sentence for each file with tensors that no layer takes."""
    notes = []
    for lora in loras:
        file = _opened(lora.path, lora.stamp, config)
        _checked(lora.path, lora.stamp, config)
        if count := len(file.unmatched):
            which = f"a tensor for no layer of this model: {called(file.unmatched[0])}"
            if count > 1:
                which = f"{count} tensors for no layer of this model, the first is {called(file.unmatched[0])}"
            notes.append(f"{lora.path} holds {which}; {len(file.changes)} layers take the others")
    return notes


def layer_factors(loras: Iterable[Active], part: str, config: ModelConfig) -> Iterator[tuple[Target, Factors]]:
    """What LoRAs, each times its weight, add to the layers of a part of the model: one layer of one file after another,
    in float32."""
    for lora in loras:
        for change, tensors in _read(lora.path, (x for x in lora_file(lora, config).changes if x.target.part == part)):
            yield change.target, _made(lora, change, tensors)


def lora_values(loras: Iterable[Lora], config: ModelConfig) -> Counter[str]:
    """How many values lie beside the layers of each part of the model: unet, text 0, text 1."""
    count: Counter[str] = Counter()
    for lora in loras:
        for change in _opened(lora.path, lora.stamp, config).changes:
            if active([lora], change.target.part):
                count[change.target.part] += change.values
    return count


def change_factors(lora: Active, change: LayerChange) -> Factors:
    """What one layer gets, in float32."""
    ((_, tensors),) = _read(lora.path, [change])
    return _made(lora, change, tensors)


def _made(lora: Active, change: LayerChange, tensors: dict[str, Tensor]) -> Factors:
    return factors(change.kind, tensors, change.target.shape, change.scale).scaled(lora.weight)


def _read(path: Path, changes: Iterable[LayerChange]) -> Iterator[tuple[LayerChange, dict[str, Tensor]]]:
    """The tensors of layers by leaf, in float32. Raises GgufSdError for NaN and infinity."""
    try:
        with safe_open(path, framework="pt") as file:
            for change in changes:
                tensors = {}
                for leaf, key in change.tensors.items():
                    tensors[leaf] = file.get_tensor(key).float()
                    if not is_finite(tensors[leaf]):
                        raise GgufSdError(f"{path}: tensor {key} holds NaN or infinity; get an intact copy of the LoRA")
                yield change, tensors
    except (OSError, SafetensorError) as error:
        raise GgufSdError(f"cannot read the LoRA {path}: {called(str(error))}") from error
