"""GPUs of a kind that torch does not call "cuda": with stand-ins for torch.xpu and for Triton's driver of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gguf_sd.runtime.kernel_modes import choose_kernels
from gguf_sd.runtime.memory import available_memory, choose_dtype, wide_dtype
from gguf_sd_kernels import devices
from gguf_sd_kernels.devices import Gpu, architecture_of, current_stream, gpu_of, recording, takes_ptx
from gguf_sd_kernels.triton.launcher import PreparedLaunch
from gguf_sd_kernels.tuning.fingerprint import fingerprint
from gguf_sd_kernels.tuning.self_check import Subject
from gguf_sd_kernels.tuning.verdicts import Verdicts

XPU = torch.device("xpu", 1)


class Xpu:
    """torch.xpu with two devices, and Triton's driver: the first is current."""

    def __init__(self) -> None:
        self.current, self.capturing, self.started = 0, False, list[tuple[int, tuple[object, ...]]]()

    def get_device_properties(self, device: torch.device) -> Any:
        return SimpleNamespace(name="Arc", max_compute_units=32, total_memory=16 << 30)

    def is_current_stream_capturing(self) -> bool:
        return self.capturing

    def device(self, device: torch.device) -> Any:
        outer = self

        class Current:
            def __enter__(self) -> None:
                self.before, outer.current = outer.current, device.index

            def __exit__(self, *error: object) -> None:
                outer.current = self.before

        return Current()

    def get_current_device(self) -> int:
        return self.current

    def get_current_stream(self, device: int) -> int:
        return 70 + device

    def __getitem__(self, grid: tuple[int, ...]) -> Any:  # a kernel, and what it is compiled to
        def start(*arguments: object, **options: object) -> Xpu:
            self.started.append((self.current, arguments))
            return self

        return start

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        return 5 << 30, 16 << 30

    def memory_reserved(self, device: torch.device) -> int:
        return 3 << 30

    def memory_allocated(self, device: torch.device) -> int:
        return 1 << 30

    def is_bf16_supported(self, including_emulation: bool) -> bool:
        return not including_emulation

    arg_names = ("x", "n")
    __name__ = "kernel"


@pytest.fixture
def xpu(monkeypatch: pytest.MonkeyPatch) -> Xpu:
    fake, real = Xpu(), torch.get_device_module
    monkeypatch.setattr(
        torch, "get_device_module", lambda device: fake if torch.device(device).type == "xpu" else real(device)
    )
    monkeypatch.setattr(devices, "_triton_driver", lambda: fake)
    for cached in (devices._gpu_of, fingerprint):
        cached.cache_clear()
    return fake


def test_what_it_is(xpu: Xpu) -> None:
    """No launches are known for it, so weights are decoded, and the library multiplies."""
    assert gpu_of(XPU) == Gpu("Arc", None, 32)
    assert not takes_ptx(XPU)
    assert current_stream(XPU) == 71
    facts = fingerprint(XPU)
    assert (facts["name"], facts["capability"], facts["processors"]) == ("Arc", "Arc", 32)
    assert choose_kernels("dequantize", "auto", XPU) == ("dequantize", "quantized")


def test_a_launch(xpu: Xpu) -> None:
    x: Any = SimpleNamespace(get_device=lambda: 1, data_ptr=lambda: 64, device=XPU)
    start = PreparedLaunch(xpu, (3,), XPU, (5,), {})
    for current in (0, 1):
        xpu.current = current
        start(x)
        assert xpu.current == current
    assert xpu.started == [(1, (x, 5)), (1, (64, 5))]


def test_its_memory(xpu: Xpu) -> None:
    """Asked of its own module in torch: what is free, and what torch keeps for reuse."""
    assert available_memory(XPU) == 7 << 30
    assert choose_dtype("auto", XPU) == torch.float16
    assert wide_dtype(XPU) == torch.bfloat16


def test_nothing_is_checked_while_launches_are_recorded(xpu: Xpu) -> None:
    checked: list[Subject] = []
    known = Verdicts(XPU, check=lambda subject, device: checked.append(subject))
    xpu.capturing = True
    with pytest.raises(RuntimeError, match="has to be checked before it becomes part of a graph"):
        known.trusted(Subject("layer norm", "float16", sizes=(64,)))
    assert not checked
    assert not recording(torch.device("cpu"))


def test_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch for NVIDIA has a gcnArchName as well, the device's name."""
    nvidia = SimpleNamespace(name="RTX 3060", major=8, minor=6, gcnArchName="RTX 3060")
    assert architecture_of(nvidia) == "86"
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert architecture_of(SimpleNamespace(name="MI300X", major=9, minor=4, gcnArchName="gfx942:x")) == "gfx942:x"
