"""Small real files of every kind, made once: what the mutators change."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import save
from torch import Tensor

from gguf_sd.adapters.targets import Target
from gguf_sd.bench.calls import Samples
from gguf_sd.config import ModelConfig
from gguf_sd_convert.calibrate.imatrix import Imatrix, write_imatrix
from gguf_sd_convert.convert import ConvertOptions, convert
from tests.adapters.conftest import all_targets, kohya, name_of, random_lora
from tests.fuzz.gguf_mutator import Parts, take_apart

# A model of as few tensors as a Stable Diffusion can have.
SMALL: dict[str, Any] = {
    "unet": {
        "block_out_channels": (32,),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
    },
    "vae": {
        "block_out_channels": (32,),
        "down_block_types": ("DownEncoderBlock2D",),
        "up_block_types": ("UpDecoderBlock2D",),
    },
}


def control_file(folder: Path) -> Parts:
    """A ControlNet for SMALL, as a GGUF file in pieces."""
    from tests.conftest import UNET, randomise
    from tests.control.conftest import SHARED

    known = {name: value for name, value in (UNET | SMALL["unet"]).items() if name in SHARED}
    net: Any = diffusers.ControlNetModel(**known, conditioning_embedding_out_channels=(8, 8, 16, 16))
    randomise(net, 9)
    net.save_pretrained(folder / "control")
    convert(folder / "control", folder / "control.gguf", ConvertOptions(type="q4_0"))
    return take_apart(folder / "control.gguf")


def imatrix_file(folder: Path, config: ModelConfig) -> Parts:
    """Calibration data with their calls."""
    calls = Samples(
        torch.randn(2, config.unet.in_channels, 2, 2),
        torch.tensor([1, 2]),
        torch.tensor([0, 1]),
        torch.ones(2),
        torch.randn(2, 77, config.unet.context_dim),
    )
    importance = {"model.diffusion_model.out.2.weight": torch.rand(9), "model.diffusion_model.x.weight": torch.rand(32)}
    write_imatrix(folder / "imatrix.gguf", Imatrix(importance, calls), ["a"])
    return take_apart(folder / "imatrix.gguf")


def lora_tensors(config: ModelConfig) -> dict[str, Tensor]:
    """Of each kind one layer: LoRA, LoHa, LoKr and a difference."""
    chosen = [target for target in all_targets(config, ["unet"]) if len(target.shape) == 2]
    state = dict(kohya(random_lora(config, chosen[:1]), config))
    name, (rows, columns) = _key(chosen[1], config), chosen[1].shape
    for leaf, shape in (("w1_a", (rows, 2)), ("w1_b", (2, columns)), ("w2_a", (rows, 2)), ("w2_b", (2, columns))):
        state[f"{name}.hada_{leaf}"] = torch.randn(shape)
    name, (rows, columns) = _key(chosen[2], config), chosen[2].shape
    state |= {f"{name}.lokr_w1": torch.randn(4, 2), f"{name}.lokr_w2": torch.randn(rows // 4, columns // 2)}
    return state | {f"{_key(chosen[3], config)}.diff": torch.randn(*chosen[3].shape)}


def _key(target: Target, config: ModelConfig) -> str:
    return f"lora_unet_{name_of(target, config).replace('.', '_')}"


def safetensors_parts(state: dict[str, Tensor]) -> tuple[dict[str, Any], bytes]:
    """Header and data of a file."""
    raw = save({name: tensor.contiguous() for name, tensor in state.items()})
    end = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:end]), raw[end:]


def archive_members(content: Any) -> dict[str, bytes]:
    """The files of the zip archive that torch.save makes of something."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with zipfile.ZipFile(buffer) as archive:
        return {f"m/{name.partition('/')[2]}": archive.read(name) for name in archive.namelist()}


def legacy_bytes(content: Any) -> bytes:
    """What torch.save wrote before 1.6."""
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()
