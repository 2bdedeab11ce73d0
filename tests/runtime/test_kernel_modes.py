"""Which kernels are chosen, and what becomes of a model that is handed to them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gguf_sd.errors import GgufSdError
from gguf_sd.runtime import kernel_modes
from gguf_sd.runtime.kernel_modes import choose_kernels
from gguf_sd_kernels.devices import Gpu
from gguf_sd_kernels.tuning import launch as launches
from gguf_sd_kernels.tuning.launch import Launch, Measured, Product, save_measured

SOME_GPU = Gpu("Some GPU 7", "mma", 8)
CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the user's own tables; the GPU is called Some GPU 7."""
    monkeypatch.setattr(kernel_modes, "TABLES", tmp_path / "none")
    monkeypatch.setattr(launches, "_measured", {})
    monkeypatch.setenv("GGUF_SD_CACHE", str(tmp_path))
    monkeypatch.setattr(kernel_modes, "gpu_of", lambda device: SOME_GPU)
    (tmp_path / "tables").mkdir()
    return tmp_path / "tables"


@pytest.mark.parametrize("weights", ["auto", "quantized", "resident"])
def test_auto_is_for_gpus_with_triton(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_kernels("auto", weights, CPU) == ("torch", weights)
    assert choose_kernels("auto", weights, GPU) == ("auto", weights)
    assert choose_kernels("torch", weights, GPU) == ("torch", weights)
    monkeypatch.setattr(kernel_modes, "find_spec", lambda name: None)
    assert choose_kernels("auto", weights, GPU) == ("torch", weights)


def test_tables_are_read(tables: Path, caplog: pytest.LogCaptureFixture) -> None:
    product = Product("linear", "Q4_0", 5, 32, 64)
    assert kernel_modes.load_tables(GPU) == 0
    table = {product: Measured(Launch(16, 32, 64, 4, 2), 2.0, 1.0, 0.5)}
    save_measured(tables / "some-gpu-7.json", "Some GPU 7", table)
    assert kernel_modes.load_tables(GPU) == 1
    assert launches.measured(product, SOME_GPU)
    (tables / "some-gpu-7.json").write_text("{")
    assert kernel_modes.load_tables(GPU) == 0
    assert "some-gpu-7.json is no table" in caplog.text


@pytest.mark.parametrize("kernels", ["fused", "dequantize", "int8"])
def test_triton_kernels_keep_the_weights_quantised(kernels: str) -> None:
    assert choose_kernels(kernels, "auto", GPU) == (kernels, "quantized")
    assert choose_kernels("resident", "auto", GPU) == ("resident", "resident")
    with pytest.raises(GgufSdError, match=f"'{kernels}' work on quantized weights, and resident"):
        choose_kernels(kernels, "resident", GPU)
    with pytest.raises(GgufSdError, match="'resident' work on resident weights, and quantized"):
        choose_kernels("resident", "quantized", GPU)


def test_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GgufSdError, match="'quick'; choose from auto, fused, dequantize, int8, resident, torch"):
        choose_kernels("quick", "auto", GPU)
    with pytest.raises(GgufSdError, match="run on a GPU, the device is cpu"):
        choose_kernels("fused", "auto", CPU)
    monkeypatch.setattr(kernel_modes, "find_spec", lambda name: None)
    with pytest.raises(GgufSdError, match="need Triton, which is not installed"):
        choose_kernels("fused", "auto", GPU)


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("input_blocks.1.1.transformer_blocks.0.attn2.to_k", True),
        ("middle_block.1.transformer_blocks.3.attn2.to_v", True),
        ("input_blocks.0.0", True),
        ("out.2", True),
        ("input_blocks.1.1.transformer_blocks.0.attn2.to_q", False),
        ("input_blocks.1.1.transformer_blocks.0.attn1.to_k", False),
        ("output_blocks.0.0.in_layers.2", False),
        ("input_blocks.10.0.out_layers.3", False),
        ("input_blocks.1.1.transformer_blocks.0.attn1.to_out.0", False),
    ],
)
def test_what_stays_in_16_bits(name: str, kept: bool) -> None:
    assert bool(kernel_modes.SIXTEEN_BITS.search(name)) == kept
