"""What the scripts that run on a GPU share: the device's own clock, its memory, and the rates it reaches."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MATMUL_SIZE, COPY_BYTES, REPEATS = 8192, 2 << 30, 10


def prepare(name: str) -> torch.device:
    """The device called ``name``; kernels run in Triton's interpreter on a CPU. Comes before triton is imported."""
    device = torch.device(name)
    if device.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    return device


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return "CPU, Triton's interpreter: times mean nothing"


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def call_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Seconds from the first launch of ``call`` to the end of its last kernel, by CUDA events."""
    synchronize(device)
    if device.type == "cpu":
        started = time.perf_counter()
        call()
        return time.perf_counter() - started
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


@dataclass(frozen=True)
class Rates:
    """What the device reaches: ``tflops`` of a large float16 product of random matrices, 10^12 operations a second,
    and ``gbytes`` of a large copy, 10^9 bytes read and written a second."""

    tflops: float
    gbytes: float

    def floor_ms(self, gmac: float, nbytes: float) -> float:
        """The time below which no step with so much arithmetic (10^9 multiply-accumulates) and memory traffic gets."""
        return max(2 * gmac / self.tflops, nbytes / self.gbytes / 1e6)


def measured_rates(device: torch.device) -> Rates:
    size, nbytes = (MATMUL_SIZE, COPY_BYTES) if device.type == "cuda" else (128, 1 << 20)
    a, b = torch.randn(2, size, size, device=device, dtype=torch.float16)
    source = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def best(call: Callable[[], Tensor]) -> float:
        call()
        return min(call_seconds(call, device) for _ in range(REPEATS))

    product, copy = best(lambda: a @ b), best(lambda: target.copy_(source))
    return Rates(tflops=2 * size**3 / product / 1e12, gbytes=2 * nbytes / copy / 1e9)


def used_memory(device: torch.device) -> int:
    """Bytes that the driver has given out, to whomever; 0 on a CPU. What torch keeps for later counts."""
    if device.type == "cpu":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def settled_memory(device: torch.device) -> int:
    """As :func:`used_memory`, once torch has given back what it only keeps for later."""
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return used_memory(device)
