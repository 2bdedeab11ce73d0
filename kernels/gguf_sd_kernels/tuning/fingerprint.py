"""What findings about kernels hold for: the kind of GPU, its driver, torch, Triton, and the kernels' own sources."""

from __future__ import annotations

import hashlib
import json
import re
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from gguf_sd_kernels.devices import architecture_of, processors_of

SOURCES = Path(__file__).parent.parent / "triton"
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


@cache
def fingerprint(device: torch.device) -> dict[str, str | int]:
    """All that findings depend on. Two cards of one kind in one machine have the same: nothing here is a card's own."""
    facts: dict[str, str | int] = {"name": "CPU, Triton's interpreter"}
    if device.type != "cpu":
        properties = torch.get_device_module(device).get_device_properties(device)
        facts = {
            "name": properties.name,
            "capability": architecture_of(properties),
            "processors": processors_of(properties),
            "memory": int(properties.total_memory),
        }
    facts |= {"driver": driver_version(), "torch": torch.__version__, "triton": _triton_version()}
    return facts | {"kernels": kernels_version()}


def file_name(device: torch.device) -> str:
    """Of the file with findings on such a device: "NVIDIA H200" -> "nvidia-h200-" and twelve hexadecimal digits."""
    facts = fingerprint(device)
    slug = re.sub(r"[^a-z0-9]+", "-", str(facts["name"]).lower()).strip("-")
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return f"{slug}-{digest[:12]}.json"


@cache
def kernels_version() -> str:
    """A hash of the kernels' sources: what was found about others says nothing about these."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def driver_version() -> str:
    """The GPU driver's version, as far as it says so: NVIDIA's kernel module, and what torch was built for."""
    try:
        module = NVIDIA_DRIVER.read_text().splitlines()[0]
    except (OSError, IndexError, UnicodeDecodeError):
        module = ""
    found = re.search(r"\d+\.\d+(\.\d+)?", module)
    return f"{found.group() if found else ''}/{torch.version.cuda or torch.version.hip or ''}"


def _triton_version() -> str:
    for name in ("triton", "pytorch-triton-rocm", "pytorch-triton-xpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return ""
