"""What kernels need to know of a GPU, and how to make it the current one: through torch's module for its kind of
device (``torch.cuda``, which is AMD's too, or ``torch.xpu``), none of them by name."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

# Compute capability * 10 -> family, see tuning.launch.UNTUNED.
FAMILIES = {80: "mma", 86: "mma", 89: "mma", 90: "wgmma", 100: "tcgen05", 103: "tcgen05", 120: "mma120", 121: "mma120"}


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU: the ``name`` its measurements go by, the ``family`` its untuned launches come from (None: none
    are there for it, decode and use the library), and its multiprocessors."""

    name: str
    family: str | None
    processors: int


def architecture_family(architecture: str) -> str | None:
    """The family of "86" (compute capability * 10) or "gfx1100"; None for GPUs whose matrix instructions, if they have
    any, Triton does not use, NVIDIA before sm_80, AMD before MI100 and the RX 7000 series, and for other makers', which
    have no launches yet."""
    if architecture.isdigit():
        return FAMILIES.get(int(architecture))
    if architecture.startswith(("gfx908", "gfx90a", "gfx94", "gfx95")):
        return "mfma"
    return "wmma" if architecture.startswith(("gfx11", "gfx12")) else None


# What CPU tensors count as being on where Triton's interpreter runs the kernels; few multiprocessors, so that K is
# split at times. tools.emulated_gpu puts another one in its place.
INTERPRETER = Gpu("cpu", "mma", 4)
stands_in = INTERPRETER


def gpu_of(device: torch.device) -> Gpu:
    """What ``device`` is; for a CPU, what stands in for a GPU there."""
    return stands_in if device.type == "cpu" else _gpu_of(device)


def emulated(device: torch.device) -> bool:
    """Whether ``device`` is a CPU that executes a GPU's machine code."""
    return device.type == "cpu" and stands_in is not INTERPRETER


@cache
def _gpu_of(device: torch.device) -> Gpu:
    properties = torch.get_device_module(device).get_device_properties(device)
    return Gpu(properties.name, architecture_family(architecture_of(properties)), processors_of(properties))


def architecture_of(properties: Any) -> str:
    """What torch's properties of a device say: "86" (compute capability * 10) or "gfx1100"; of other kinds the name."""
    if torch.version.hip:
        return str(properties.gcnArchName)  # which torch for NVIDIA has too, as another word for the name
    return f"{properties.major}{properties.minor}" if hasattr(properties, "major") else str(properties.name)


def processors_of(properties: Any) -> int:
    """Multiprocessors; Intel's Xe cores."""
    return int(getattr(properties, "multi_processor_count", 0) or getattr(properties, "max_compute_units", 0))


def takes_ptx(device: torch.device) -> bool:
    """Whether inline PTX can be compiled for ``device``: on NVIDIA's, which torch calls "cuda" as it does AMD's."""
    return device.type == "cuda" and not torch.version.hip


def recording(device: torch.device) -> bool:
    """Whether launches on ``device`` are being recorded into a graph in place of made."""
    asked = getattr(torch.get_device_module(device), "is_current_stream_capturing", None)
    return asked is not None and asked()


def gpu_family(device: torch.device) -> str | None:
    """The family of ``device``, see :class:`Gpu`."""
    return gpu_of(device).family


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of ``device``."""
    return gpu_of(device).processors


@cache
def _triton_driver() -> Any:
    from triton.runtime import driver

    return driver.active


def current_device() -> int:
    """The number of the device that Triton launches on."""
    return _triton_driver().get_current_device()


def current_stream(device: torch.device) -> int:
    """A number that tells the streams of ``device`` apart: of the one that Triton launches on."""
    return 0 if device.index is None else _triton_driver().get_current_stream(device.index)


def as_current(device: torch.device) -> AbstractContextManager[object]:
    """Makes ``device`` the one that Triton launches on, within a ``with`` block; nothing for a device without index."""
    if device.index is None:
        return nullcontext()
    return torch.get_device_module(device).device(device)
