"""A UNet handed from mode to mode, which the engine does once and a benchmark several times, and to CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gguf_sd.models.layers import Quantized
from gguf_sd.models.unet import UNet
from gguf_sd.runtime.cuda_graph import CudaCapture
from gguf_sd.runtime.kernel_modes import SIXTEEN_BITS, make_resident, use_kernels

MODES = ("auto", "fused", "dequantize", "resident", "int8", "torch")
PACKED_MODES = ("auto", "fused", "dequantize", "int8")  # that read the same packed weights


def set_mode(unet: UNet, mode: str) -> UNet:
    """Hands a UNet fresh from random_unet to ``mode`` of MODES, in place, as gguf_sd.pipeline does."""
    if mode == "resident":
        make_resident(unet, next(unet.parameters()).dtype, mode)
    if mode != "torch":
        use_kernels(unet, mode)
    return unet


def switch_mode(unet: UNet, mode: str) -> None:
    """From one of PACKED_MODES to another."""
    for name, module in unet.named_modules():
        if isinstance(module, Quantized) and module.packed is not None:
            module.mode = "fused" if mode == "int8" and SIXTEEN_BITS.search(name) else mode


class EagerCapture:
    """Stands for CudaCapture where there is no GPU: a replay runs the step."""

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return run

    def reserved(self) -> int:
        return 0


def capture_on(device: torch.device) -> Any:
    """What captures steps on this device."""
    return CudaCapture(device) if device.type == "cuda" else EagerCapture()
