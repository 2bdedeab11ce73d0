"""Launches are what the compiler was promised, and past Triton's dispatch the same as through it."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gguf_sd_kernels import devices
from gguf_sd_kernels.repack import repack
from gguf_sd_kernels.triton import launcher
from gguf_sd_kernels.triton.conv import conv2d_fused
from gguf_sd_kernels.triton.dequantize import dequantize_packed
from gguf_sd_kernels.triton.launcher import PreparedLaunch
from gguf_sd_kernels.triton.linear import linear_fused
from gguf_sd_kernels.triton.norm import group_norm_silu_triton, layer_norm_triton

ROOT = Path(__file__).parents[3]


def unaligned(tensor: Tensor) -> Tensor:
    """The same values, two bytes after a multiple of 16."""
    moved = tensor.new_empty(tensor.numel() + 1)[1:].view(tensor.shape).copy_(tensor)
    assert moved.data_ptr() % 16
    return moved


def test_unaligned_activations_are_copied(material: Any) -> None:
    x, residual = material.normal(3, 64, seed=1), material.normal(3, 32, seed=2)
    weight, bias = repack(material.weight("Q8_0", 32, 64, seed=3)[0], "Q8_0"), material.normal(32, seed=4)
    got = linear_fused(unaligned(x), weight, unaligned(bias), unaligned(residual))
    assert torch.equal(got, linear_fused(x, weight, bias, residual))
    picture, norm = material.normal(1, 64, 2, 3, seed=5), material.normal(2, 64, seed=6)
    want = group_norm_silu_triton(picture, 8, *norm)
    assert torch.equal(group_norm_silu_triton(unaligned(picture), 8, *map(unaligned, norm)), want)
    assert torch.equal(layer_norm_triton(unaligned(x), *norm), layer_norm_triton(x, *norm))
    taps = repack(material.weight("Q4_0", 32, 64, seed=7)[0], "Q4_0", (32, 64, 1, 1))
    emb = material.normal(1, 32, seed=8)
    assert torch.equal(conv2d_fused(picture, taps, emb=unaligned(emb)), conv2d_fused(picture, taps, emb=emb))


def test_weights_that_break_the_promise_are_refused(material: Any) -> None:
    weight = repack(material.weight("Q8_0", 32, 64, seed=9)[0], "Q8_0")
    moved = replace(weight, scales=unaligned(weight.scales))
    with pytest.raises(ValueError, match=r"scales of dequantize_kernel starts at 0x[0-9a-f]+, .*no multiple of 16"):
        dequantize_packed(moved, torch.float16)
    with pytest.raises(ValueError, match="quants of a packed weight must be contiguous"):
        replace(weight, quants=weight.quants[:, ::2])


class Driver:
    """Two GPUs, of which ``current`` is Triton's."""

    def __init__(self) -> None:
        self.current, self.started = 0, []  # type: ignore[var-annotated]

    def __getitem__(self, grid: tuple[int, ...]) -> Any:  # a kernel through Triton's dispatch, and a compiled one
        def start(*arguments: object, **options: object) -> Driver:
            self.started.append((self.current, grid, arguments))
            return self

        return start

    arg_names = ("x", "out", "n", "WIDTH")
    __name__ = "kernel"


class OnGpu:
    """What a launch asks of a tensor on GPU ``number``."""

    def __init__(self, number: int):
        self.number, self.device = number, torch.device("cuda", number)

    def get_device(self) -> int:
        return self.number

    def data_ptr(self) -> int:
        return 4096


def test_the_operands_device_is_current(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the first launch, which compiles, and at the next ones; afterwards the old one is current again. The compiled
    kernel is handed addresses."""
    driver = Driver()

    class Current:
        def __init__(self, device: torch.device):
            self.number = device.index

        def __enter__(self) -> None:
            self.before, driver.current = driver.current, self.number

        def __exit__(self, *error: object) -> None:
            driver.current = self.before

    monkeypatch.setattr(launcher, "as_current", Current)
    monkeypatch.setattr(launcher, "current_device", lambda: driver.current)
    start = PreparedLaunch(driver, (7,), torch.device("cuda", 1), (5,), {"WIDTH": 8}, num_warps=4)
    there, elsewhere = OnGpu(1), OnGpu(0)
    for current in (0, 0, 1):
        driver.current = current
        start(there, None)  # type: ignore[arg-type]
        assert driver.current == current
    assert [current for current, _, _ in driver.started] == [1, 1, 1]
    assert [arguments for _, _, arguments in driver.started] == [(there, None, 5), *2 * [(4096, None, 5, 8)]]
    with pytest.raises(ValueError, match="out of kernel is on cuda:0, the other operands are on cuda:1"):
        start(there, elsewhere)  # type: ignore[arg-type]
    assert isinstance(devices.as_current(torch.device("cuda", 1)), torch.cuda.device)


# Triton's own dispatch and compiler for an sm_80 that is not there; the driver's launch is recorded in place of made.
RECORDED = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

class Utils:
    def load_binary(self, *arguments): return 1, 1, 32, 0, 1024
    def get_device_properties(self, device): return {"max_shared_mem": 166912, "multiprocessor_count": 108}

class Launcher:
    def __init__(self, source, metadata): self.name = metadata.name
    def __call__(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *arguments):
        calls.append((self.name, x, y, z, stream, function, [known(a) for a in arguments]))

def known(argument):
    # A number, None, or that it is a tensor or an address, which may be as low as a heap begins.
    address = isinstance(argument, torch.Tensor) or (isinstance(argument, int) and argument > 1 << 24)
    return "an address" if address else argument

class Driver:
    utils, launcher_cls = Utils(), Launcher
    def get_current_target(self): return GPUTarget("cuda", 80, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 5

calls, dispatched = [], []
driver.set_active(Driver())
real = JITFunction.run
JITFunction.run = lambda self, *a, **o: (dispatched.append(self.__name__), real(self, *a, **o))[1]

from gguf_sd_kernels.repack import PackedWeight
from gguf_sd_kernels.triton.conv import conv2d_fused
from gguf_sd_kernels.triton.dequantize import dequantize_packed
from gguf_sd_kernels.triton.int8 import linear_int8
from gguf_sd_kernels.triton.linear import linear_fused
from gguf_sd_kernels.triton.norm import group_norm_silu_triton, layer_norm_triton

def half(*shape): return torch.empty(shape, dtype=torch.float16)
weight = PackedWeight(torch.empty(64, 32, dtype=torch.uint8), half(64, 2), None, "Q4_0", (64, 64))
taps = PackedWeight(torch.empty(64, 9 * 32, dtype=torch.uint8), half(64, 18), None, "Q4_0", (64, 64, 3, 3), True)
runs = [
    lambda: linear_fused(half(5, 64), weight, half(64)),
    lambda: linear_fused(half(5, 64), weight, geglu=True),
    lambda: conv2d_fused(half(2, 64, 5, 4), taps, half(64), 1, 1, emb=half(2, 96)[:, :64]),
    lambda: linear_int8(half(5, 64), weight, residual=half(5, 64)),
    lambda: dequantize_packed(weight, torch.float16),
    lambda: group_norm_silu_triton(half(1, 64, 4, 4), 8, half(64), half(64)),
    lambda: layer_norm_triton(half(3, 64), half(64), half(64)),
]
for run in runs:
    calls.clear(), dispatched.clear(), run()
    first, through = list(calls), len(dispatched)
    calls.clear(), dispatched.clear(), run()
    assert first and through == len(first), (first, through)
    assert calls == first, (first, calls)
    assert not dispatched, "the second time goes past Triton's dispatch"
print("launched", len(runs))
"""


def test_past_the_dispatch_arrives_what_went_through_it() -> None:
    folders = os.pathsep.join(str(ROOT / folder) for folder in (".", "kernels"))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([folders, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", RECORDED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "launched 7\n"
