"""What ``python -m gguf_sd_kernels.tools.emulate`` executes besides single kernels: whole guided steps of the demo
model's UNet in each mode, and a whole picture of it, against the same in float32 and plain torch."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.lib.random_weights import unet_inputs
from gguf_sd import Pipeline
from gguf_sd.checkpoint.model_file import ModelFile
from gguf_sd.demo import model_folder
from gguf_sd.runtime.kernel_modes import use_kernels
from gguf_sd_convert.convert import ConvertOptions, convert
from gguf_sd_kernels.tools.emulate_cases import INT8_LIMIT, LIMIT, Case

CPU = torch.device("cpu")
QTYPE, SIDE, STEPS = "q8_0", 16, 12
MODES = {"fused": LIMIT, "int8": INT8_LIMIT, "dequantize": LIMIT}
PROMPT, SEED = "a red circle left of a blue square", 3
PICTURE_LIMIT = 10 ** (-50 / 20)  # 50 dB, of 16-bit against float32 pictures


@cache
def model_path() -> Path:
    """The demo model, quantised; in a folder that lives as long as this process."""
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / "demo.gguf"
    convert(model_folder(), path, ConvertOptions(type=QTYPE), quiet=True)
    _folders.append(folder)
    return path


_folders: list[tempfile.TemporaryDirectory[str]] = []


def unet_cases() -> Iterator[Case]:
    """A step for guidance, two predictions at once, in each mode that packs weights."""
    shape = f"2x4x{SIDE}x{SIDE}"
    for mode, limit in MODES.items():

        def run(mode: str = mode) -> tuple[Tensor, Tensor]:
            return guided_step(mode, torch.float16), guided_step("torch", torch.float32).double()

        yield Case("unet step", f"{QTYPE} fp16 {mode}", shape, limit, run)


@cache
def _inputs() -> list[Tensor]:
    """Noise as latents, a timestep in the middle, contexts as random."""
    config = ModelFile.open(model_path()).config.unet
    latents, timesteps, context = unet_inputs(config, 2, SIDE, torch.float32, CPU)
    return [latents[:1].expand(2, -1, -1, -1).contiguous(), timesteps, context]


def guided_step(mode: str, dtype: torch.dtype) -> Tensor:
    """Both predictions that guidance takes, without and with a prompt, of the UNet on kernels ``mode``."""
    latents, timesteps, context = _inputs()
    unet = ModelFile.open(model_path()).load_unet(dtype)
    if mode != "torch":
        use_kernels(unet, mode)
    predictions: Tensor = unet(latents.to(dtype), timesteps, context.to(dtype))
    return predictions


def picture_cases() -> Iterator[Case]:
    """A whole picture, fused; compared by its pixels."""

    def run() -> tuple[Tensor, Tensor]:
        settings: dict[str, Any] = {"prompt": PROMPT, "steps": STEPS, "seed": SEED}
        loaded: dict[str, Any] = {"device": "cpu", "weights": "quantized", "cuda_graph": "off"}
        (want,) = Pipeline.load(model_path(), dtype="float32", kernels="torch", **loaded)(**settings)
        (got,) = Pipeline.load(model_path(), dtype="float16", kernels="fused", **loaded)(**settings)
        return pixels(got), pixels(want).double()

    yield Case("picture", f"{QTYPE} fp16 fused", f"{STEPS} steps", PICTURE_LIMIT, run, is_picture=True)


def pixels(image: Any) -> Tensor:
    """A picture's values, 0 … 1."""
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).float() / 255
