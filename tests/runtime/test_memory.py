"""Devices, dtypes, and what is said when memory runs out."""

from __future__ import annotations

import pytest
import torch

from gguf_sd.errors import GgufSdError
from gguf_sd.runtime.memory import (
    LATER_IMPORTS,
    choose_device,
    choose_dtype,
    give_back,
    is_out_of_memory,
    out_of_memory_advice,
    peak_memory,
    process_memory,
)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (MemoryError(), True),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            True,
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_errors_that_mean_too_little_memory(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) == expected


def test_a_real_failure_of_the_cpus_allocator() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_advice_is_about_the_job() -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    full = out_of_memory_advice(gpu, "resident", 4, (512, 768))
    for words in ("a smaller --batch than 4", "smaller size than 512x768", "--weights quantized", "--device cpu"):
        assert words in full
    least = out_of_memory_advice(cpu, "quantized", 1, (512, 512))
    assert not any(words in least for words in ("--batch", "--weights", "--device"))


@pytest.mark.parametrize("name", ["float16", "fp16", "F16", "half", "torch.float16", torch.float16])
def test_names_of_dtypes(name: str | torch.dtype) -> None:
    assert choose_dtype(name, torch.device("cpu")) == torch.float16


def test_devices_and_dtypes_that_are_none() -> None:
    cpu = torch.device("cpu")
    assert choose_device(cpu) == cpu
    assert choose_dtype(None, cpu) == choose_dtype("auto", cpu)
    assert choose_device(None) == choose_device("auto")
    for wrong in ("float8", torch.int8, 16):
        with pytest.raises(GgufSdError, match="unknown dtype"):
            choose_dtype(wrong, cpu)  # type: ignore[arg-type]
    with pytest.raises(GgufSdError, match="unknown device"):
        choose_device(3.5)  # type: ignore[arg-type]


def test_the_memory_of_the_process() -> None:
    """Goes up with what is allocated, down where it is given back, and its peak stays."""
    cpu = torch.device("cpu")
    before, size = process_memory(cpu), 300 << 20
    block = torch.ones(size, dtype=torch.uint8)
    assert 0.9 * size < process_memory(cpu) - before < 1.1 * size
    del block
    pieces = [torch.ones(1 << 16, dtype=torch.uint8) for _ in range(2000)]  # too small to be mapped one by one
    kept = pieces[::100]
    del pieces
    give_back(cpu)
    assert process_memory(cpu) - before < 0.2 * size
    assert (peak_memory(cpu) or 0) > before - LATER_IMPORTS + 0.8 * size  # which are not there yet
    assert len(kept) == 20
