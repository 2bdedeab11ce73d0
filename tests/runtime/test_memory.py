"""What a plan decides from numbers alone, and what is said when memory runs out after all."""

from __future__ import annotations

import itertools

import pytest
import torch

from gguf_sd.errors import GgufSdError
from gguf_sd.runtime.memory import (
    HEADROOM,
    KEPT_FIRST,
    MemoryNeeds,
    choose_device,
    choose_dtype,
    is_out_of_memory,
    out_of_memory_advice,
    plan_memory,
)

GB = 10**9
NEEDS = MemoryNeeds(unet_blocks=1 * GB, unet_full=4 * GB, text=(GB, 2 * GB), vae=GB, safety=GB, step=GB, decode=5 * GB)


@pytest.mark.parametrize("weights", ["quantized", "resident"])
def test_more_memory_keeps_more(weights: str) -> None:
    """In the order of what is slowest to load, and whichever way the weights lie."""
    kept = [plan_memory(free * GB // 10, NEEDS, weights).keep for free in range(0, 300)]
    assert [set(a) <= set(b) for a, b in itertools.pairwise(kept)] == [True] * 299
    steps = [set(k) for k, _ in itertools.groupby(kept)]
    assert (steps[0], steps[-1]) == (set(), set(KEPT_FIRST))
    assert all(k in [set(KEPT_FIRST[:n]) for n in range(5)] for k in steps)


def test_what_is_kept_leaves_room_for_every_stage() -> None:
    # With everything kept the VAE's decoding is the most: UNet, VAE, both text encoders, checker, and the work.
    most = (1 + 1 + 3 + 1 + 5) * GB / HEADROOM
    assert plan_memory(int(most) + 2, NEEDS, "quantized").keep == set(KEPT_FIRST)
    assert "safety" not in plan_memory(int(most) - 2, NEEDS, "quantized").keep


def test_weights_and_guidance() -> None:
    assert plan_memory(10 * GB + 1, NEEDS).weights == "resident"  # two UNets, and two halves of guidance
    assert plan_memory(10 * GB, NEEDS).weights == "quantized"
    assert plan_memory(0, NEEDS, "resident").weights == "resident"
    assert [plan_memory(free, NEEDS, "quantized").batch_guidance for free in (3 * GB, 3 * GB + 1)] == [False, True]
    with pytest.raises(GgufSdError, match="unknown weights mode 'none'; choose from auto, quantized, resident"):
        plan_memory(GB, NEEDS, "none")


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
