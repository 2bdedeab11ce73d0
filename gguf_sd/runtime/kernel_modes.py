"""Which implementation the UNet's layers run on: plain torch, or the Triton kernels in one of their modes."""

from __future__ import annotations

import logging
import re
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

import gguf_sd_kernels
from gguf_sd.errors import GgufSdError
from gguf_sd.models.layers import GroupNorm, LayerNorm, Quantized, resident
from gguf_sd.models.unet import UNetEncoder
from gguf_sd_kernels.cache_folder import cache_folder
from gguf_sd_kernels.cpu import int8
from gguf_sd_kernels.devices import emulated, gpu_of
from gguf_sd_kernels.tuning.launch import load_measured, table_name
from gguf_sd_kernels.tuning.verdicts import keep_verdicts

log = logging.getLogger(__name__)

KERNEL_MODES = ("auto", "fused", "dequantize", "int8", "resident", "torch")
# Where tables of measurements lie: with the kernels, and what the user measured on this machine.
TABLES = Path(gguf_sd_kernels.__file__).parent / "tuning" / "tables"
# Not in 8 bits: the prompt's first token has outliers that would drown the others' values, and the first and last
# convolution meet the latents themselves.
SIXTEEN_BITS = re.compile(
    r"\.attn2\.to_[kv]$|^input_blocks\.0\.|^out\.|^input_hint_block\.|^zero_convs\.|^middle_block_out\."
)


def choose_kernels(name: str, weights: str, device: torch.device) -> tuple[str, str]:
    """(kernels, weights) to use: the first of KERNEL_MODES but ``auto`` only on a GPU and with Triton, the second as in
    :class:`gguf_sd.runtime.memory.MemoryPlan`.

    ``fused`` decodes inside the products, ``dequantize`` before each, ``int8`` quantises the activations too,
    ``resident`` decodes once at load; these run in Triton on a GPU. ``torch`` is plain torch, anywhere. ``auto`` takes
    the fastest of fused and dequantize for each layer, by what was measured on this GPU, see
    :mod:`gguf_sd.runtime.tuning`. In any mode, what a kernel does wrongly on this GPU is left to the next:
    fused -> dequantize -> torch. On a CPU ``int8`` is torch with weights of that name, see
    :mod:`gguf_sd.models.int8`; ``auto`` leaves them to the memory plan, see :func:`may_take_int8`.
    Raises GgufSdError for an unknown name, and what device or weights do not allow.
    """
    if name not in KERNEL_MODES:
        raise GgufSdError(f"unknown kernels {name!r}; choose from {', '.join(KERNEL_MODES)}")
    if name in ("auto", "torch"):
        return ("auto" if name == "auto" and device.type != "cpu" and _has_triton() else "torch"), weights
    if device.type == "cpu" and not emulated(device):
        if name == "int8":
            return "torch", _int8_weights(weights)
        raise GgufSdError(f"kernels {name!r} run on a GPU, the device is {device}; choose torch, int8 or auto")
    if not _has_triton():
        raise GgufSdError(f"kernels {name!r} need Triton, which is not installed; choose torch or auto")
    needs = "resident" if name == "resident" else "quantized"
    if weights not in ("auto", needs):
        raise GgufSdError(f"kernels {name!r} work on {needs} weights, and {weights} are asked for; leave one out")
    return name, needs


def may_take_int8(kernels: str, weights: str, device: torch.device) -> bool:
    """Whether a plan for so chosen kernels and weights may have the UNet compute in 8 bits: on a processor with
    instructions for it, unless something else is asked for."""
    return kernels == "auto" and weights == "auto" and device.type == "cpu" and not emulated(device) and int8.is_fast()


def as_recorded(kernels: str, weights: str, device: torch.device, recorded: str | None) -> str:
    """The kernels to ask for where a picture is painted again: on a CPU ``auto`` is what the picture was painted with,
    ``recorded`` (int8, torch, or None where it does not say), as 8 bits show. Elsewhere, and where something is asked
    for, ``kernels``."""
    return kernels if recorded is None or not may_take_int8(kernels, weights, device) else recorded


def _int8_weights(weights: str) -> str:
    if not int8.has_operators():
        raise GgufSdError(
            "kernels 'int8' need oneDNN's operators in 8 bits, which this torch lacks; choose torch or auto"
        )
    if not int8.is_fast():
        raise GgufSdError(
            "kernels 'int8' need a processor with AVX512-VNNI, AVX-VNNI or AMX on a CPU, which this one lacks; "
            "choose torch or auto"
        )
    if weights != "auto":
        raise GgufSdError(f"kernels 'int8' keep weights in 8 bits on a CPU, and {weights} are asked for; leave one out")
    return "int8"


def _has_triton() -> bool:
    return find_spec("triton") is not None


def load_tables(device: torch.device) -> int:
    """Reads what was measured on GPUs of this name; returns for how many products. The user's own table goes first."""
    gpu = gpu_of(device)
    name = table_name(gpu.name)
    count = 0
    for path in (TABLES / name, cache_folder() / "tables" / name):
        if path.is_file():
            try:
                count += load_measured(path, gpu)
            except (OSError, ValueError) as error:
                log.warning("%s; it is not used", error)
    return count


def use_kernels(model: UNetEncoder, mode: str, device: torch.device | None = None) -> None:
    """Hands quantised layers and norms to the Triton kernels, in place; the model is on its GPU already, or without
    values and will run on ``device``.

    ``mode`` is one of KERNEL_MODES but torch; with ``resident`` no quantised layers are left, see
    :func:`make_resident`. Whatever the mode, launches are those measured on this GPU, where a table is known.
    """
    device = device or next(model.parameters()).device
    if device.type != "cpu":
        load_tables(device)
    model.stack()
    for name, module in model.named_modules():
        if isinstance(module, Quantized):
            module.pack("fused" if mode == "int8" and SIXTEEN_BITS.search(name) else mode)
        elif isinstance(module, GroupNorm | LayerNorm):
            module.fused = True


def make_resident(model: nn.Module, dtype: torch.dtype, kernels: str = "torch") -> None:
    """Replaces every quantised layer by its full-precision counterpart, in place and where it is; decoded by Triton
    unless ``kernels`` is torch."""
    device = next(model.parameters()).device
    if kernels != "torch" and device.type != "cpu":
        keep_verdicts(device, cache_folder())
    for name, module in list(model.named_modules()):
        if isinstance(module, Quantized):
            model.set_submodule(name, resident(module, dtype, triton=kernels != "torch"))
