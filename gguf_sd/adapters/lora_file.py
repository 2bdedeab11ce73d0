"""A LoRA file held against a model, from its header alone: which layers it changes, and how.

No torch is imported and no weights are read: what does not fit is found before a model is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from gguf_sd.adapters.lora_names import refused, split
from gguf_sd.adapters.lora_shapes import Made, held_values, made
from gguf_sd.adapters.peft_scale import peft_scale
from gguf_sd.adapters.targets import Target, targets
from gguf_sd.checkpoint.safetensors_header import Table, is_safetensors, read_table
from gguf_sd.checkpoint.what_is_it import LORA, what_is
from gguf_sd.config import ModelConfig
from gguf_sd.errors import GgufSdError
from gguf_sd.field_checks import called

FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
# Leaves of each kind beside alpha: the sets of which one must be there whole, and those that may come with it.
WHOLE: dict[str, tuple[set[str], ...]] = {
    "LoRA": ({"down", "up"},),
    "LoHa": ({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},),
    "LoKr": (
        {"lokr_w1", "lokr_w2"},
        {"lokr_w1_a", "lokr_w1_b", "lokr_w2"},
        {"lokr_w1", "lokr_w2_a", "lokr_w2_b"},
        {"lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"},
    ),
    "full": ({"diff"},),
}
EXTRA = {"LoRA": {"mid"}, "LoHa": {"hada_t1", "hada_t2"}, "LoKr": {"lokr_t2"}, "full": set[str]()}
FAMILIES = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "SDXL"}  # by the prompt's width
OTHERS = ("lora_transformer_", "transformer.", "lora_unet_double_blocks", "lora_unet_joint_blocks")


@dataclass(frozen=True)
class LayerChange:
    """What a file holds for one layer. ``tensors``: leaf, see :class:`gguf_sd.adapters.lora_names.Name`, -> name in the
    file. ``scale`` is what the header says of alpha / rank, for where no tensor does."""

    target: Target
    kind: str  # a key of WHOLE
    tensors: Mapping[str, str]
    scale: float
    values: int  # that it takes beside the layer


@dataclass(frozen=True)
class LoraFile:
    """A LoRA that fits a model; ``unmatched`` are the names of tensors for no layer of it."""

    path: Path
    changes: tuple[LayerChange, ...]
    unmatched: tuple[str, ...]

    @classmethod
    def open(cls, path: Path, config: ModelConfig) -> LoraFile:
        """Raises GgufSdError, naming the tensor, for a file that is no LoRA, is one of another kind or for another
        model, or has tensors that do not go together."""
        table, layers = lora_table(path), targets(config)
        found: dict[Target, dict[str, str]] = {}
        unmatched: list[str] = []
        for key in table.tensors:
            name = split(key)
            target = layers.get((name.part, name.module)) if name else None
            if name is None or target is None:
                unmatched.append(key)
            elif name.leaf in found.setdefault(target, {}):
                raise GgufSdError(f"{path} names a layer twice, as {found[target][name.leaf]} and as {key}")
            else:
                found[target][name.leaf] = key
        if not found:
            raise GgufSdError(
                f"{path} fits no layer of this model ({_family(config)}){_made_for(table)}; its first tensor is "
                f"{called(unmatched[0])}"
            )
        changes = tuple(_change(path, table, config, target, leaves) for target, leaves in found.items())
        return cls(path, changes, tuple(unmatched))


def lora_table(path: Path) -> Table:
    """The header of a LoRA. Raises GgufSdError for anything else, without looking at a model."""
    if not path.is_file():
        what = "is a folder" if path.exists() else "does not exist"
        raise GgufSdError(f"the LoRA {path} {what}; give a .safetensors file")
    if not is_safetensors(path):
        raise GgufSdError(f"{path} is no safetensors file; a LoRA is taken as .safetensors alone")
    table = read_table(path)
    if found := next(((kind, key) for key in table.tensors if (kind := refused(key))), None):
        kind, key = found
        raise GgufSdError(
            f"{path} is a {kind} ({called(key)}); gguf-sd takes LoRA, LoHa, LoKr and differences of weights"
        )
    if not any(split(key) for key in table.tensors):
        what_it_is = what_is({name: stored.shape for name, stored in table.tensors.items()})
        named = f" but {what_it_is.name}" if what_it_is not in (None, LORA) and what_it_is else ""
        raise GgufSdError(f"{path} is no LoRA{named}: none of its {len(table.tensors)} tensors is named as a LoRA's")
    return table


def _change(path: Path, table: Table, config: ModelConfig, target: Target, leaves: dict[str, str]) -> LayerChange:
    present = set(leaves) - {"alpha"}
    kinds = (kind for kind, sets in WHOLE.items() if any(one <= present <= one | EXTRA[kind] for one in sets))
    kind, first = next(kinds, None), next(iter(leaves.values()))
    if kind is None:
        raise GgufSdError(f"{path} is incomplete: beside {first} it has only {', '.join(sorted(leaves))} of that layer")
    shapes = {leaf: table.tensors[key].shape for leaf, key in leaves.items()}
    for leaf, key in leaves.items():
        if leaf == "alpha" and prod(shapes[leaf]) != 1:
            raise GgufSdError(f"{path}: tensor {key} has shape {list(shapes[leaf])}; alpha is one number")
        if leaf != "alpha" and table.tensors[key].dtype not in FLOATS:
            raise GgufSdError(f"{path}: tensor {key} is {table.tensors[key].dtype}; floating-point numbers are needed")
    try:
        weight = made(kind, shapes)
    except ValueError as error:
        raise GgufSdError(f"{path} does not go together: of the layer of tensor {first}, {error}") from None
    if not weight.fits(target.shape):
        raise _for_another(path, table, config, target, first, weight)
    scale, name = 1.0, split(first)
    if kind == "LoRA" and name:
        scale = peft_scale(path, table.metadata, target.part, name.module, shapes["down"][0])
    return LayerChange(target, kind, leaves, scale, held_values(kind, shapes, target.shape))


def _for_another(path: Path, table: Table, config: ModelConfig, target: Target, key: str, got: Made) -> GgufSdError:
    return GgufSdError(
        f"{path} is for another model than this one ({_family(config)}){_made_for(table)}: {key} makes a weight {got}, "
        f"the model's {target.part} {target.module} has {list(target.shape)}"
    )


def _family(config: ModelConfig) -> str:
    return FAMILIES.get(config.unet.context_dim, config.name)


def _made_for(table: Table) -> str:
    """The model that a LoRA was made for, by the width of its cross-attention, for the end of a sentence."""
    for key, stored in table.tensors.items():
        name = split(key)
        keys = name is not None and name.leaf == "down" and name.module.endswith("attn2_to_k")
        if keys and len(stored.shape) == 2 and stored.shape[1] in FAMILIES:
            return f", but {FAMILIES[stored.shape[1]]}"
    return ", but a transformer model such as Flux" if any(key.startswith(OTHERS) for key in table.tensors) else ""
