"""Random LoRAs for tiny models, under the names that each trainer gives its tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from gguf_sd.adapters.targets import Target, targets
from gguf_sd.checkpoint.model_file import ModelFile
from gguf_sd.config import ModelConfig
from gguf_sd_convert.convert import ConvertOptions, convert

# Before, diffusers misread kohya's names of small UNets, and needs of peft what it no longer has.
reads_loras = pytest.mark.skipif(
    tuple(map(int, version("diffusers").split(".")[:2])) < (0, 38), reason="diffusers 0.38 and newer read these LoRAs"
)
Changes = dict[Target, dict[str, Tensor]]
KOHYA = {"unet": "lora_unet_", "text 0": "lora_te1_", "text 1": "lora_te2_"}
DIFFUSERS = {"unet": "unet.", "text 0": "text_encoder.", "text 1": "text_encoder_2."}


@pytest.fixture(scope="session")
def tiny_file(tiny_pipeline: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function from a type and the fields of Tiny to a GGUF file; the same call, the same file."""
    folder, made = tmp_path_factory.mktemp("lora"), dict[str, Path]()

    def make(type: str = "q8_0", **fields: Any) -> Path:
        key = f"{type}{sorted(fields.items())}"
        if key not in made:
            made[key] = folder / f"{len(made)}.gguf"
            convert(tiny_pipeline(**fields), made[key], ConvertOptions(type=type))
        return made[key]

    return make


def config_of(path: Path) -> ModelConfig:
    return ModelFile.open(path).config


def all_targets(config: ModelConfig, parts: Iterable[str] = ("unet", "text 0", "text 1")) -> list[Target]:
    return [target for target in dict.fromkeys(targets(config).values()) if target.part in set(parts)]


def random_lora(
    config: ModelConfig, chosen: Iterable[Target] | None = None, rank: int = 3, alpha: float | None = 2.0
) -> Changes:
    """Low-rank factors for each layer, of a size that changes pictures."""
    generator, changes = torch.Generator().manual_seed(rank), Changes()
    for target in chosen or all_targets(config):
        out, channels, *kernel = target.shape
        leaf = target.module.rpartition(".")[2]
        if leaf == "skip_connection" or (leaf in ("proj_in", "proj_out") and not config.unet.linear_projection):
            kernel = [1, 1]
        inner = channels * (kernel[0] * kernel[1] if kernel else 1)
        down = torch.randn(rank, channels, *kernel, generator=generator) * (0.5 / inner**0.5)
        up = torch.randn(out, rank, *(1 for _ in kernel), generator=generator) * (0.5 / rank**0.5)
        changes[target] = {"lora_down.weight": down, "lora_up.weight": up}
        if alpha is not None:
            changes[target]["alpha"] = torch.tensor(alpha)
    return changes


def kohya(changes: Changes, config: ModelConfig, original: bool = False) -> dict[str, Tensor]:
    """Named as by sd-scripts: diffusers' paths, or with ``original`` the original checkpoint's, as for SDXL."""
    state: dict[str, Tensor] = {}
    for target, tensors in changes.items():
        prefix = KOHYA[target.part] if len(config.text) > 1 else KOHYA[target.part].replace("te1", "te")
        path = name_of(target, config, original).replace(".", "_")
        state |= {f"{prefix}{path}.{leaf}": tensor for leaf, tensor in tensors.items()}
    return state


def peft(changes: Changes, config: ModelConfig) -> dict[str, Tensor]:
    """Named as by diffusers."""
    state: dict[str, Tensor] = {}
    leaves = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight", "alpha": "alpha"}
    for target, tensors in changes.items():
        path = DIFFUSERS[target.part] + name_of(target, config)
        state |= {f"{path}.{leaves[leaf]}": tensor for leaf, tensor in tensors.items()}
    return state


def name_of(target: Target, config: ModelConfig, original: bool = False) -> str:
    from gguf_sd.checkpoint.tensor_names import inverted, rename, unet_modules

    if target.part != "unet":
        return f"text_model.{target.module}" if "projection" not in target.module else target.module
    if original:
        return target.module
    weight = rename(f"{target.module}.weight", inverted(unet_modules(config.unet))) or f"{target.module}.weight"
    return weight.removesuffix(".weight")


def save(state: dict[str, Tensor], path: Path, **metadata: str) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path, metadata or None)
    return path
