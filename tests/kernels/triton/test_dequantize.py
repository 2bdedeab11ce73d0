"""Repacking and decoding on the GPU: lossless, and bit for bit gguf-py's values rounded once."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from gguf_sd_kernels import ops
from gguf_sd_kernels.formats import block_format
from gguf_sd_kernels.repack import PACKED_TYPES, repack, unpack
from gguf_sd_kernels.triton.dequantize import dequantize_packed

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


def any_blocks(qtype: str, rows: int, cols: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random codes under moderate scales and minima of either sign: blocks, and gguf-py's float32."""
    rng = np.random.default_rng(seed)
    fmt = block_format(qtype)
    blocks = rng.integers(0, 256, (rows * cols // 32, fmt.type_size), dtype=np.uint8)
    halves = (fmt.scale_bytes + fmt.min_bytes) // 2
    blocks[:, : 2 * halves] = rng.standard_normal((len(blocks), halves)).astype(np.float16).view(np.uint8)
    blocks = blocks.reshape(rows, -1)
    want = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[qtype])
    return torch.from_numpy(blocks).to(device), torch.from_numpy(want).to(device)


@pytest.mark.parametrize("qtype", PACKED_TYPES)
def test_repacking_loses_nothing(qtype: str, device: torch.device) -> None:
    rng = np.random.default_rng(1)
    n_bytes = ops.row_bytes(qtype, 96)
    blocks = torch.from_numpy(rng.integers(0, 256, (7, n_bytes), dtype=np.uint8)).to(device)  # NaN scales too
    weight = repack(blocks, qtype)
    assert torch.equal(unpack(weight), blocks)
    assert (weight.nbytes, weight.rows, weight.cols) == (blocks.numel(), 7, 96)
    assert torch.equal(unpack(weight.to("cpu")), blocks.cpu())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("qtype", PACKED_TYPES)
def test_dequantize_is_gguf_rounded_once(qtype: str, dtype: torch.dtype, device: torch.device) -> None:
    blocks, want = any_blocks(qtype, 37, 160, seed=2, device=device)
    got = dequantize_packed(repack(blocks, qtype), dtype)
    wanted_bits = want.to(dtype).view(BITS[dtype])
    if dtype == torch.bfloat16 and device.type == "cpu":
        wanted_bits = (want.view(torch.int32) >> 16).short()  # Triton's interpreter cuts off where GPUs round
    assert torch.equal(got.view(BITS[dtype]), wanted_bits)


@pytest.mark.parametrize("qtype", PACKED_TYPES)
@pytest.mark.parametrize("tap_major", [True, False])
@pytest.mark.parametrize("shape", [(5, 32, 3, 3), (7, 96, 1, 1), (3, 64, 1, 3)])
def test_conv_weights_come_out_channels_last(
    qtype: str, tap_major: bool, shape: tuple[int, int, int, int], device: torch.device
) -> None:
    oc, ic, kh, kw = shape
    blocks, flat = any_blocks(qtype, oc, ic * kh * kw, seed=3, device=device)
    want = flat.view(oc, kh, kw, ic).permute(0, 3, 1, 2) if tap_major else flat.view(shape)
    out = torch.full((oc, ic * kh * kw), float("nan"), dtype=torch.float16, device=device)
    got = dequantize_packed(repack(blocks, qtype, shape, tap_major=tap_major), torch.float16, out)
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert got.data_ptr() == out.data_ptr()
    assert torch.equal(got, want.half())


def test_errors_give_the_values(device: torch.device) -> None:
    blocks, _ = any_blocks("Q4_0", 4, 64, seed=4, device=device)
    with pytest.raises(ValueError, match=r"Q5_0.*Q4_0, Q4_1, Q8_0"):
        repack(blocks, "Q5_0")
    with pytest.raises(ValueError, match=r"torch\.int8"):
        repack(blocks.view(torch.int8), "Q4_0")
    with pytest.raises(ValueError, match=r"4 rows of 64 values.*\[4, 32, 3, 3\]"):
        repack(blocks, "Q4_0", (4, 32, 3, 3))
    weight = repack(blocks, "Q4_0")
    with pytest.raises(ValueError, match="int32"):
        dequantize_packed(weight, torch.int32)
    with pytest.raises(ValueError, match=r"256 elements.*\[4, 32\]"):
        dequantize_packed(weight, torch.float16, torch.empty(4, 32, dtype=torch.float16, device=device))
