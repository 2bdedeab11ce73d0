"""What is kept where: how much memory there is, and the plan that follows from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from gguf_sd.config import ModelConfig
from gguf_sd.errors import GgufSdError
from gguf_sd.models.layers import Quantized

WEIGHT_MODES = ("auto", "quantized", "resident")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DTYPE_ALIASES = {"f32": "float32", "f16": "float16", "fp32": "float32", "fp16": "float16", "half": "float16"}
DTYPE_ALIASES |= {"bf16": "bfloat16"} | {f"torch.{name}": name for name in DTYPES}
# A UNet step holds about this many feature maps of the finest level at once, per picture and half of guidance: a guided
# SD 1.5 step at 512x512 in bfloat16 took 199 MB beside the weights, 38 maps of 2.6 MB for each half.
LIVE_FEATURE_MAPS = 40
# And the VAE's decoder about this many of its own finest: its last level begins with twice the channels, and holds
# what goes in, what is normalised, what comes out and the shortcut.
LIVE_DECODER_MAPS = 8
# Of a part: it stays loaded; it is loaded for its stage and goes behind it; its layers come and go one by one.
PLACEMENTS = ("resident", "staged", "streamed")
KEPT_FIRST = ("unet", "vae", "text", "safety")  # what takes longest to load again comes first
HEADROOM = 0.8  # share of the free memory that keeping parts may use up
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
        if device.type == "cuda":
            return torch.float16
        return wide_dtype(device)
    known = DTYPE_ALIASES.get(str(name).lower(), str(name).lower())
    if known not in DTYPES:
        raise GgufSdError(f"unknown dtype {str(name)!r}; choose from auto, {', '.join(DTYPES)}")
    return DTYPES[known]


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
class MemoryNeeds:
    """Bytes that a model's parts take on its device, by name, and what working with them takes besides."""

    unet_blocks: int  # the UNet as the file has it
    unet_full: int  # the UNet dequantised
    text: tuple[int, ...]  # one an encoder
    vae: int
    safety: int  # 0 = the model has none
    step: int  # a UNet step, for one half of guidance
    decode: int  # a picture through the VAE

    @classmethod
    def of(cls, values: PartValues, config: ModelConfig, pixels: int, decoded: int, dtype: torch.dtype) -> MemoryNeeds:
        """``pixels`` are those of all pictures painted at once, ``decoded`` those of one."""
        size = dtype.itemsize
        latent_pixels = pixels // config.vae.downscale**2
        return cls(
            unet_blocks=values.unet_bytes,
            unet_full=values.unet * size,
            text=tuple(count * size for count in values.text),
            vae=values.vae * size,
            safety=values.safety * size,
            step=LIVE_FEATURE_MAPS * latent_pixels * config.unet.block_out_channels[0] * size,
            decode=LIVE_DECODER_MAPS * decoded * config.vae.block_out_channels[0] * size,
        )


@dataclass(frozen=True)
class PartValues:
    """How many weights the parts of a model have, and the bytes of the UNet's in the file."""

    unet: int
    unet_bytes: int
    text: tuple[int, ...]
    vae: int
    safety: int


@dataclass(frozen=True)
class MemoryPlan:
    """How a job makes do with the memory there is."""

    weights: str  # "quantized": the UNet's blocks, dequantised a layer at a time; "resident": dequantised at load
    placement: Mapping[str, str]  # of PLACEMENTS, by the name of the part: text 0, text 1, unet, vae, safety
    batch_guidance: bool  # both halves of guidance in one UNet call
    vae_tile: int | None = None  # edge of a VAE tile in latent pixels; None = the whole picture at once
    attention_bytes: int | None = None  # at most so much for the scores of a chunk; None = the kernel's own measure
    peak: int = 0  # bytes that this takes, as modelled
    budget: int = 0  # bytes that it may take

    @property
    def keep(self) -> frozenset[str]:
        """The kinds of parts (text, unet, vae, safety) that stay loaded afterwards."""
        going = {_kind(name) for name, placement in self.placement.items() if placement != "resident"}
        return frozenset(map(_kind, self.placement)) - going


def _kind(part: str) -> str:
    return part.partition(" ")[0]


def plan_memory(free: int, needs: MemoryNeeds, weights: str = "auto") -> MemoryPlan:
    """Fits a job into ``free`` bytes, those of parts that are loaded already included. ``weights`` other than auto
    stay as they are asked for. Raises GgufSdError for a weights mode that is none."""
    if weights not in WEIGHT_MODES:
        raise GgufSdError(f"unknown weights mode {weights!r}; choose from {', '.join(WEIGHT_MODES)}")
    if weights == "auto":
        weights = "resident" if free > 2 * needs.unet_full + 2 * needs.step else "quantized"
    unet = needs.unet_full if weights == "resident" else needs.unet_blocks
    batch_guidance = free - unet > 2 * needs.step
    step = needs.step * (2 if batch_guidance else 1)
    kept = _kept(HEADROOM * free, unet, needs, step)
    parts = [*(f"text {index}" for index in range(len(needs.text))), "unet", "vae", *["safety"] * bool(needs.safety)]
    placement = {part: "resident" if _kind(part) in kept else "staged" for part in parts}
    return MemoryPlan(weights, placement, batch_guidance, budget=free)


def _kept(free: float, unet: int, needs: MemoryNeeds, step: int) -> frozenset[str]:
    """As many of KEPT_FIRST as leave room for every stage of a picture: a stage takes its own part, its work, and the
    parts that are kept meanwhile."""
    sizes = {"unet": unet, "vae": needs.vae, "text": sum(needs.text), "safety": needs.safety}
    alone = sizes | {"text": max(needs.text, default=0)}  # text encoders run one after the other
    work = {"unet": step, "vae": needs.decode, "text": 0, "safety": 0}
    kept: set[str] = set()
    for part in KEPT_FIRST:
        more = {*kept, part}
        peak = max(
            sum(sizes[name] for name in more) + (0 if stage in more else alone[stage]) + work[stage] for stage in sizes
        )
        if peak > free:
            break
        kept = more
    return frozenset(kept)


def held_bytes(model: nn.Module, device: torch.device) -> int:
    """Bytes of a model's weights that count as used on its device: on a CPU quantised blocks do not, they are pages of
    the file that the system takes back when it needs them."""
    count = sum(p.nbytes for p in model.parameters())
    if device.type == "cuda":
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
    if weights == "resident":
        ways.append("--weights quantized")
    if device.type != "cpu":
        ways.append("--device cpu")
    else:
        ways.append("closing other programs")
    where = "the memory of the GPU" if device.type == "cuda" else "memory"
    return f"out of memory: {where} does not hold this job; try {', or '.join(ways)}"
