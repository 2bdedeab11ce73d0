"""One product timed on a device: its launches, decoding and the library's product, and the library's alone."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gguf_sd_kernels.tuning.launch import Launch, Measured
from gguf_sd_kernels.tuning.operands import Operands

REPEATS = 5
CACHE_BYTES = 128 << 20  # more than the L2 cache of any GPU so far (RTX 5090: 96 MiB)
LARGE, COPY_BYTES = 4096, 256 << 20  # the side of a large product of matrices, and a large copy
AGREE = 1e-2  # libraries may add parts in 16 bits

Call = Callable[[], Tensor]


class Clock(Protocol):
    """What times: ``now`` in seconds of the time that the user waits, ``seconds`` that a call takes on the device, with
    nothing of its operands in the cache."""

    def now(self) -> float: ...

    def seconds(self, call: Call) -> float: ...


class DeviceClock:
    """By events of the device; a CPU's, where Triton's interpreter runs kernels, by the time that passes."""

    def __init__(self, device: torch.device):
        self.device = device
        self.flush = torch.empty(CACHE_BYTES if device.type != "cpu" else 0, dtype=torch.uint8, device=device)

    def now(self) -> float:
        return time.monotonic()

    def seconds(self, call: Call) -> float:
        """The median of a few calls, after one that may compile and choose algorithms."""
        if self.device.type == "cpu":
            started = time.perf_counter()
            call()
            return time.perf_counter() - started
        call()
        module = torch.get_device_module(self.device)
        times = []
        for _ in range(REPEATS):
            start, stop = module.Event(enable_timing=True), module.Event(enable_timing=True)
            self.flush.zero_()  # and the device has work while the call is on its way there
            start.record()
            call()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop) / 1e3)
        return statistics.median(times)


@dataclass(frozen=True)
class Rates:
    """What the device reaches: 10^12 operations a second in a large 16-bit product, 10^9 bytes a second, read and
    written, in a large copy."""

    tflops: float
    gbytes: float


def measure_rates(device: torch.device, dtype: torch.dtype, clock: Clock) -> Rates:
    """The roof under which all products stay."""
    size, nbytes = (LARGE, COPY_BYTES) if device.type != "cpu" else (128, 1 << 20)
    generator = torch.Generator(device).manual_seed(0)
    a = torch.randn(size, size, generator=generator, device=device).to(dtype)  # zeros would draw less power
    source = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product, copy = clock.seconds(lambda: a @ a), clock.seconds(lambda: target.copy_(source))
    return Rates(2 * size**3 / product / 1e12, 2 * nbytes / copy / 1e9)


@dataclass
class Times:
    """Microseconds of one product so far."""

    dequantize: float
    resident: float
    fused: dict[Launch, float]

    @property
    def measured(self) -> Measured | None:
        """The best of it; None before a launch was timed."""
        if not self.fused:
            return None
        launch = min(self.fused, key=self.fused.__getitem__)
        return Measured(launch, round(self.fused[launch], 2), round(self.dequantize, 2), round(self.resident, 2))


@torch.inference_mode()
def time_library(operands: Operands, clock: Clock, decode: Callable[[Tensor], Tensor] | None = None) -> Times:
    """The product by the library, its weight decoded each time, and once for all. ``decode`` writes the decoded weight
    into what it is given; by default our kernel does."""
    product = operands.use.product
    scratch = torch.empty(product.n * product.k, dtype=operands.dtype, device=operands.device)
    decode = decode or operands.decoded
    weight = decode(scratch)
    dequantize = clock.seconds(lambda: operands.library(decode(scratch)))
    return Times(dequantize * 1e6, clock.seconds(lambda: operands.library(weight)) * 1e6, {})


@torch.inference_mode()
def time_launch(operands: Operands, launch: Launch, clock: Clock, want: Tensor) -> float:
    """Microseconds of the fused product with ``launch``. Raises ArithmeticError where its result, at this size, is not
    ``want``, the library's."""
    got = operands.call(launch)
    error = float((got.double() - want.double()).norm() / want.double().norm())
    if not error <= AGREE:
        raise ArithmeticError(f"its result at full size is off by {error:.2g} of the library's")
    return clock.seconds(lambda: operands.call(launch)) * 1e6
