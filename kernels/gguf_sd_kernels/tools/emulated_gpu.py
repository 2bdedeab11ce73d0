"""A driver of Triton whose GPU is the emulator: kernels are compiled for its target as ever, and launched on CPU
tensors by executing their machine code."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from gguf_sd_kernels import devices
from gguf_sd_kernels.tools.code_object import CodeObject, pack_kernargs, parse_code_object
from gguf_sd_kernels.tools.emulator import Emulator
from gguf_sd_kernels.tuning.launch import Prepared

SHARED_BYTES, THREADS = 64 * 1024, 1024  # of a work group, at most
PROCESSORS = 4  # few, so that K is split at times


class EmulatedGpu:
    """What Triton's runtime asks of a driver, of the GPU that ``emulator`` stands in for."""

    def __init__(self, emulator: Emulator):
        self.emulator, self.target = emulator, emulator.target
        self.launches: Counter[str] = Counter()  # by the kernel's name
        self.seconds = 0.0  # spent in the emulator
        self.utils = _Utilities(self.target.wave)

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("hip", self.target.architecture, self.target.wave)

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        """There is one."""

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """What starts the compiled kernel ``source``."""
        kinds = list(source.signature.values())

        def launch(x: int, y: int, z: int, stream: int, function: CodeObject, *rest: Any) -> None:
            arguments = rest[-len(kinds) :]  # after Triton's own: metadata and hooks
            self._launch(metadata, function, (x, y, z), list(zip(kinds, arguments, strict=True)))

        return launch

    def _launch(
        self, metadata: Any, code: CodeObject, grid: tuple[int, int, int], arguments: list[tuple[str, Any]]
    ) -> None:
        values = [(kind, _address(value)) for kind, value in arguments if kind != "constexpr"]
        threads = metadata.num_warps * self.target.wave
        start = time.perf_counter()
        self.emulator.run(code, grid, threads, metadata.shared, pack_kernargs(code, values, grid, threads))
        self.seconds += time.perf_counter() - start
        self.launches[metadata.name] += 1


class _Utilities:
    """The driver's functions below the launch."""

    def __init__(self, wave: int):
        self.wave = wave

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_BYTES, "multiprocessor_count": PROCESSORS, "warpSize": self.wave}

    def load_binary(
        self, name: str, binary: bytes, shared: int, device: int
    ) -> tuple[CodeObject, CodeObject, int, int, int]:
        """(module, function, registers, spills, threads)."""
        code = parse_code_object(binary, name)
        return code, code, 0, code.scratch, THREADS


def _address(value: Any) -> int | float:
    if value is None:
        return 0
    return value.data_ptr() if isinstance(value, torch.Tensor) else value


@contextmanager
def emulated_gpu(emulator: Emulator) -> Iterator[EmulatedGpu]:
    """Within the block, Triton's launches on CPU tensors run in ``emulator``, and launches are chosen as for its GPU.

    Raises RuntimeError where Triton was told to interpret kernels instead of compiling them.
    """
    from triton import knobs
    from triton.runtime import driver

    if knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set, and then kernels are not compiled; unset it")
    gpu = EmulatedGpu(emulator)
    active, buffers = driver._active, knobs.amd.use_buffer_ops
    driver.set_active(gpu)
    name = emulator.target.architecture
    devices.stands_in = devices.Gpu(f"emulated {name}", devices.architecture_family(name), PROCESSORS)
    knobs.amd.use_buffer_ops = False
    Prepared.forget()
    try:
        yield gpu
    finally:
        driver._active, knobs.amd.use_buffer_ops = active, buffers
        devices.stands_in = devices.INTERPRETER
        Prepared.forget()
