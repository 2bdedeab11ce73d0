"""What is kept where: how much memory there is, and the plan that follows from it."""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from gguf_sd.errors import GgufSdError
from gguf_sd.models.int8 import Int8Layer
from gguf_sd.models.layers import Quantized
from gguf_sd.runtime import host_heap
from gguf_sd_kernels.cpu import scratch

WEIGHT_MODES = ("auto", "quantized", "resident")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DTYPE_ALIASES = {"f32": "float32", "f16": "float16", "fp32": "float32", "fp16": "float16", "half": "float16"}
DTYPE_ALIASES |= {"bf16": "bfloat16"} | {f"torch.{name}": name for name in DTYPES}
# Of a part: it stays loaded; it is loaded for its stage and goes behind it; its layers come and go one by one.
PLACEMENTS = ("resident", "staged", "streamed")
# Bytes of what a first picture imports, of libraries' buffers and compiled primitives, and of libraries' code that runs
# again. SD 1.5 in bfloat16: 45 MB and 30.
LATER_IMPORTS = 76 << 20
USUAL_PROCESS = 300 << 20  # where it cannot be measured
GPU_LIBRARIES = 64 << 20  # workspaces of cuBLAS and cuDNN
MARGIN = 0.2  # share of the free memory that is left to others, where no budget is given
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "STATUS_ALLOC_FAILED")


def choose_device(name: str | torch.device | None = "auto") -> torch.device:
    """`auto`, or None, is the first CUDA (or ROCm) device, else the CPU. Raises GgufSdError for a device that is not
    there."""
    if name is None or name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise GgufSdError(f"unknown device {name!r}; choose from auto, cpu, cuda, cuda:0, …") from None
    if device.type not in ("cpu", "cuda"):
        raise GgufSdError(f"device {str(name)!r} is not supported; choose from auto, cpu, cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise GgufSdError(f"there is no device {str(name)!r}: torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def choose_dtype(name: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """`auto`, or None, is float16 on a GPU; on a CPU bfloat16 where the processor multiplies it (AMX, AVX512-BF16),
    else float32. Raises GgufSdError for another name than those of DTYPES and DTYPE_ALIASES."""
    if name is None or name == "auto":
        if device.type != "cpu":
            return torch.float16
        return wide_dtype(device)
    known = DTYPE_ALIASES.get(str(name).lower(), str(name).lower())
    if known not in DTYPES:
        raise GgufSdError(f"unknown dtype {str(name)!r}; choose from auto, {', '.join(DTYPES)}")
    return DTYPES[known]


def wide_dtype(device: torch.device) -> torch.dtype:
    """The smallest dtype with float32's range that the device computes in."""
    if device.type != "cpu":
        # Emulated before Ampere: slow, and not everywhere.
        native = torch.get_device_module(device).is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float32
    return torch.bfloat16 if _cpu_has_bfloat16() else torch.float32


def _cpu_has_bfloat16() -> bool:
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, check, lambda: False)() for check in checks)


def available_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on the device without swapping; on a GPU with what torch keeps for reuse."""
    if device.type != "cpu":
        gpu = torch.get_device_module(device)
        unused = gpu.memory_reserved(device) - gpu.memory_allocated(device)
        return int(gpu.mem_get_info(device)[0] + unused)
    available = _meminfo("MemAvailable")
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    try:
        return min(available, int(limit.read_text()) - int(used.read_text()))
    except (OSError, ValueError):  # no cgroup, or no limit ("max")
        return available


def swap_memory(device: torch.device) -> int:
    """Bytes of swap that are free: what a computation on a CPU may take beyond that, slowly."""
    return _meminfo("SwapFree", 0) if device.type == "cpu" else 0


def _meminfo(key: str, otherwise: int = 4 << 30) -> int:
    """``otherwise`` where there is no /proc: by default a careful guess."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return otherwise


def process_memory(device: torch.device) -> int:
    """Bytes that this process takes before it has loaded a model, and will take for what it still imports: on a CPU
    its resident memory, on a GPU the workspace of the libraries; not the driver's context, which counts as used."""
    if device.type != "cpu":
        return GPU_LIBRARIES
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError):
        return USUAL_PROCESS + LATER_IMPORTS
    return pages * os.sysconf("SC_PAGE_SIZE") + LATER_IMPORTS


def give_back(device: torch.device, cycles: bool = False) -> None:
    """Returns memory that was freed, and is only kept for reuse, to the system: between stages, so that one does not
    pay for what another took. On a CPU the buffer for decoded weights goes too; with ``cycles`` what refers to itself,
    as a streamed part does."""
    if cycles:
        gc.collect()
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()
        return
    scratch.release()
    host_heap.trim()


def peak_memory(device: torch.device) -> int | None:
    """The most bytes that this process has taken on the device so far; None where that is not known."""
    if device.type != "cpu":
        return int(torch.get_device_module(device).max_memory_reserved(device))
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    found = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


@dataclass(frozen=True)
class MemoryPlan:
    """How a job makes do with the memory there is."""

    # "quantized": the UNet's blocks, dequantised a layer at a time; "resident": dequantised at load; "int8": encoded in
    # 8 bits at load, see gguf_sd.models.int8
    weights: str
    placement: Mapping[str, str]  # of PLACEMENTS, by the name of the part: text 0, text 1, unet, vae, safety
    batch_guidance: bool  # both halves of guidance in one UNet call
    vae_tile: int | None = None  # edge of a VAE tile in latent pixels; None = the whole picture at once
    frugal: bool = False  # on a CPU: what was freed goes back at once, see gguf_sd.runtime.host_heap
    peak: int = 0  # bytes that this takes, as modelled
    budget: int = 0  # bytes that it may take
    vae_weights: str = ""  # "int8" where the VAE's decoder computes in 8 bits
    vae_encodes: bool = True  # whether the VAE is loaded with its encoder

    @property
    def keep(self) -> frozenset[str]:
        """The kinds of parts (text, unet, vae, safety) that stay loaded afterwards."""
        going = {_kind(name) for name, placement in self.placement.items() if placement != "resident"}
        return frozenset(map(_kind, self.placement)) - going


def _kind(part: str) -> str:
    return part.partition(" ")[0]


def held_bytes(model: nn.Module, device: torch.device) -> int:
    """Bytes of a model's weights that count as used on its device: on a CPU quantised blocks do not, they are pages of
    the file that the system takes back when it needs them."""
    count = sum(p.nbytes for p in model.parameters())
    count += sum(m.nbytes for m in model.modules() if isinstance(m, Int8Layer))
    if device.type != "cpu":
        count += sum(b.nbytes for b in model.buffers())
        count += sum(m.packed.nbytes for m in model.modules() if isinstance(m, Quantized) and m.packed)
    return count


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had, on a GPU or by the system."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)


def out_of_memory_advice(device: torch.device, weights: str, batch: int, size: tuple[int, int]) -> str:
    """One sentence for who ran out of memory, with what would take less. ``size`` is width and height."""
    ways = [f"a smaller --batch than {batch}"] if batch > 1 else []
    ways.append(f"a smaller size than {size[0]}x{size[1]}")
    if weights != "quantized":
        ways.append("--weights quantized")
    if device.type != "cpu":
        ways.append("--device cpu")
    else:
        ways.append("closing other programs")
    where = "the memory of the GPU" if device.type != "cpu" else "memory"
    return f"out of memory: {where} does not hold this job; try {', or '.join(ways)}"
