"""What is kept where: how much memory there is, and the plan that follows from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from gguf_sd.config import ModelConfig
from gguf_sd.errors import GgufSdError
from gguf_sd.models.layers import Quantized

WEIGHT_MODES = ("auto", "quantized", "resident")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# A UNet step holds about this many feature maps of the finest level at once, per picture and half of guidance: a guided
# SD 1.5 step at 512x512 in bfloat16 took 199 MB beside the weights, 38 maps of 2.6 MB for each half.
LIVE_FEATURE_MAPS = 40


def choose_device(name: str = "auto") -> torch.device:
    """`auto` is the first CUDA (or ROCm) device, else the CPU. Raises GgufSdError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise GgufSdError(f"unknown device {name!r}; choose from auto, cpu, cuda, cuda:0, …") from None
    if device.type not in ("cpu", "cuda"):
        raise GgufSdError(f"device {name!r} is not supported; choose from auto, cpu, cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise GgufSdError(f"there is no device {name!r}: torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is float16 on a GPU; on a CPU bfloat16 where the processor multiplies it (AMX, AVX512-BF16), else
    float32."""
    if name == "auto":
        if device.type == "cuda":
            return torch.float16
        return wide_dtype(device)
    if name not in DTYPES:
        raise GgufSdError(f"unknown dtype {name!r}; choose from auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def wide_dtype(device: torch.device) -> torch.dtype:
    """The smallest dtype with float32's range that the device computes in."""
    if device.type == "cuda":
        # Emulated before Ampere: slow, and not everywhere.
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if _cpu_has_bfloat16() else torch.float32


def _cpu_has_bfloat16() -> bool:
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, check, lambda: False)() for check in checks)


def available_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on the device without swapping; on a GPU with what torch keeps for reuse."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    available = _meminfo("MemAvailable")
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    try:
        return min(available, int(limit.read_text()) - int(used.read_text()))
    except (OSError, ValueError):  # no cgroup, or no limit ("max")
        return available


def _meminfo(key: str) -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 4 << 30  # no /proc: a careful guess


@dataclass(frozen=True)
class Plan:
    """What a pipeline keeps in memory."""

    weights: str  # "quantized": blocks, dequantised a layer at a time; "resident": dequantised at load
    keep_parts: bool  # text encoder, UNet and VAE stay loaded between pictures, instead of one part at a time
    batch_guidance: bool  # both halves of guidance in one UNet call

    @classmethod
    def make(
        cls,
        weights: str,
        device: torch.device,
        dtype: torch.dtype,
        unet_values: int,
        config: ModelConfig,
        pixels: int,
        held: int = 0,
    ) -> Plan:
        """Fits the job to the free memory: ``unet_values`` weights in the UNet, ``pixels`` of all pictures painted
        at once. ``held`` bytes are the model's own already, from an earlier picture."""
        if weights not in WEIGHT_MODES:
            raise GgufSdError(f"unknown weights mode {weights!r}; choose from {', '.join(WEIGHT_MODES)}")
        free = available_memory(device) + held
        full = unet_values * dtype.itemsize
        latent_pixels = pixels // config.vae.downscale**2
        step = LIVE_FEATURE_MAPS * latent_pixels * config.unet.block_out_channels[0] * dtype.itemsize
        if weights == "auto":
            weights = "resident" if free > 2 * full + 2 * step else "quantized"
        left = free - (full if weights == "resident" else full // 3)
        return cls(weights, keep_parts=weights == "resident", batch_guidance=left > 2 * step)


def held_bytes(model: nn.Module, device: torch.device) -> int:
    """Bytes of a model's weights that count as used on its device: on a CPU quantised blocks do not, they are pages of
    the file that the system takes back when it needs them."""
    count = sum(p.nbytes for p in model.parameters())
    if device.type == "cuda":
        count += sum(b.nbytes for b in model.buffers())
        count += sum(m.packed.nbytes for m in model.modules() if isinstance(m, Quantized) and m.packed)
    return count
