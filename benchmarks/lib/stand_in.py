"""A GPU that is not there: whole steps on the meta device, every Triton launch counted and none run."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch

from gguf_sd_kernels import devices
from gguf_sd_kernels.tuning.launch import Prepared

META = torch.device("meta")
# What the stand-in counts as: its launches are an H100's.
GPU = devices.Gpu("stand-in", "wgmma", 132)


@contextmanager
def stand_in() -> Iterator[Counter[str]]:
    """Lets models on the meta device run with the Triton kernels, without Triton's compiler and drivers; yields how
    often each kernel is started.

    What Triton does between being called and the driver's launch is left out; all that comes before is ours and runs.
    """
    from triton.runtime.jit import JITFunction

    launches: Counter[str] = Counter()

    class Compiled:
        """Stands for triton.compiler.CompiledKernel."""

        def __init__(self, name: str):
            self.name = name

        def __getitem__(self, grid: tuple[int, int, int]) -> Any:
            name = self.name

            def start(*arguments: object) -> None:
                launches[name] += 1

            return start

    def dispatched(kernel: Any, grid: tuple[int, ...]) -> Any:
        def run(*arguments: object, **options: object) -> Compiled:
            launches[kernel.__name__] += 1
            return Compiled(kernel.__name__)

        return run

    real = devices._gpu_of

    def gpu_of(device: torch.device) -> devices.Gpu:
        return GPU if device.type == "meta" else real(device)

    Prepared.forget()
    with ExitStack() as stack:
        stack.enter_context(patch.dict(os.environ, GGUF_SD_SELF_CHECK="0"))  # nothing computes here
        stack.enter_context(patch.object(JITFunction, "__getitem__", dispatched))
        stack.enter_context(patch.object(devices, "_gpu_of", gpu_of))
        yield launches
    Prepared.forget()
