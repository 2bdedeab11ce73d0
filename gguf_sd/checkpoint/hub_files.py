"""Which of a repository's files a model takes, told from their names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from gguf_sd.errors import GgufSdError
from gguf_sd.field_checks import called

COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2", "safety_checker")  # with weights
SETTINGS = ("tokenizer", "tokenizer_2", "scheduler", "feature_extractor")  # without
SMALL = (".json", ".txt", ".model")
STEMS = ("diffusion_pytorch_model", "model")
SHARD = re.compile(r"-\d{5}-of-\d{5}")
CHECKPOINTS = (".gguf", ".safetensors", ".ckpt")  # in the order of preference
NAMED = 6  # files that a message names


def wanted_files(files: Iterable[str], where: str) -> tuple[list[str], str | None]:
    """Of the files of a repository or of a folder in it, by their paths from there, those that the model takes; and the
    one that is the model, None where that is the folder. Raises GgufSdError where no choice is clear."""
    names = sorted(files)
    if "model_index.json" in names:
        return _pipeline(names, where), None
    if "config.json" in names and (weights := _weights([n for n in names if "/" not in n])):
        return ["config.json", *weights], None  # one component, a ControlNet say
    top = [name for name in names if "/" not in name]
    for suffix in CHECKPOINTS:
        found = [name for name in top if name.lower().endswith(suffix)]
        found = found or [name for name in names if name.lower().endswith(suffix) and suffix == ".gguf"]
        if len(found) == 1:
            return found, found[0]
        if found:
            raise GgufSdError(
                f"{where} holds several models, {listed(found)}; name one of them: {where}/{called(found[0])}"
            )
    held = f"it holds {listed(names)}" if names else "it is empty"
    raise GgufSdError(f"{where} holds no model that gguf-sd reads (.gguf, .safetensors, diffusers); {held}")


def listed(names: Sequence[str]) -> str:
    return ", ".join(map(called, names[:NAMED])) + (", …" if len(names) > NAMED else "")


def _pipeline(names: Sequence[str], where: str) -> list[str]:
    """Of diffusers: configurations, tokenizers, and each component's weights."""
    found = ["model_index.json"]
    for folder in (*COMPONENTS, *SETTINGS):
        inside = [name.removeprefix(f"{folder}/") for name in names if name.startswith(f"{folder}/")]
        taken = [name for name in inside if name.endswith(SMALL) and "/" not in name and ".index." not in name]
        if inside and folder in COMPONENTS:
            weights = _weights(inside)
            if not weights:
                raise GgufSdError(
                    f"{where}/{folder} holds no .safetensors weights ({listed(inside)}); gguf-sd reads no .bin there, "
                    "take another repository of this model"
                )
            taken += weights
        found += [f"{folder}/{name}" for name in taken]
    return found


def _weights(names: Sequence[str]) -> list[str]:
    """A component's: in 16 bits where there are such, which are half as large and lose nothing that quantising keeps;
    whole or in shards with their index; nothing where there are none."""
    for fp16 in (True, False):
        for stem in STEMS:
            whole = f"{stem}.fp16.safetensors" if fp16 else f"{stem}.safetensors"
            if whole in names:
                return [whole]
            index = f"{stem}.safetensors.index.fp16.json" if fp16 else f"{stem}.safetensors.index.json"
            shards = [n for n in names if _is_shard(n, stem) and (".fp16" in n) == fp16]
            if index in names and shards:
                return [index, *shards]
    return []


def _is_shard(name: str, stem: str) -> bool:
    return name.startswith(stem) and name.endswith(".safetensors") and SHARD.search(name) is not None
