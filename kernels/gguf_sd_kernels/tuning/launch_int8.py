"""Launch configurations of products in 8 bits, and which weights and GPUs they are for."""

from __future__ import annotations

from dataclasses import replace

import torch

from gguf_sd_kernels.devices import Gpu, gpu_family
from gguf_sd_kernels.repack import PackedWeight
from gguf_sd_kernels.tuning.launch import Launch, Product, Table, best_splits, candidates

INT8_TYPES = ("Q4_0", "Q8_0")

# As launch.UNTUNED: by what compiles cleanly, with no GPU at hand. A step is one block of 32, as every block has
# scales of its own. 128x128 spills with 4 warps, on sm_90 with 8 too; on sm_100 64x64 spills, and with Triton 3.9 so do
# 128x64 with 4 warps and 128x128.
# What multiplies: IMMA (mma, mma120), IGMMA (wgmma), v_mfma_i32, v_wmma_i32. On sm_100 Triton has no tcgen05 product of
# int8 and makes mma.sync of it, IMMA too: whether that pays there has to be measured.
UNTUNED_INT8: Table = {
    "mma": (
        (64, Launch(64, 64, 32, warps=4, stages=4)),
        (512, Launch(128, 64, 32, warps=4, stages=3)),
        (1 << 31, Launch(128, 128, 32, warps=8, stages=3)),
    ),
    "mma120": (
        (64, Launch(64, 64, 32, warps=4, stages=4)),
        (512, Launch(128, 64, 32, warps=4, stages=3)),
        (1 << 31, Launch(128, 128, 32, warps=8, stages=3)),
    ),
    "wgmma": (
        (64, Launch(64, 64, 32, warps=4, stages=4)),
        (512, Launch(128, 64, 32, warps=4, stages=3)),
        (1 << 31, Launch(256, 64, 32, warps=8, stages=3)),
    ),
    "tcgen05": (
        (64, Launch(64, 32, 32, warps=4, stages=4)),
        (1 << 31, Launch(128, 64, 32, warps=8, stages=4)),
    ),
    "mfma": (
        (64, Launch(64, 64, 32, warps=4, stages=2)),
        (512, Launch(128, 64, 32, warps=8, stages=2)),
        (1 << 31, Launch(128, 128, 32, warps=8, stages=2)),
    ),
    "wmma": (
        (64, Launch(32, 64, 32, warps=4, stages=2)),
        (512, Launch(64, 64, 32, warps=8, stages=2)),
        (1 << 31, Launch(128, 64, 32, warps=8, stages=2)),
    ),
}


def choose_int8(product: Product, gpu: Gpu) -> Launch:
    """The launch for ``product`` in 8 bits.

    Raises ValueError for a GPU whose family has none.
    """
    if gpu.family not in UNTUNED_INT8:
        raise ValueError("no products in 8 bits for this GPU: use the fused ones, or dequantize")
    launch = next(launch for largest, launch in UNTUNED_INT8[gpu.family] if product.m <= largest)
    return replace(launch, splits=best_splits(product, launch, gpu.processors))


def int8_candidates(product: Product, family: str, processors: int) -> list[Launch]:
    """Launches worth measuring for ``product`` in 8 bits; none for a family without such launches."""
    return candidates(product, family, processors, UNTUNED_INT8) if family in UNTUNED_INT8 else []


def int8_supported(weight: PackedWeight, device: torch.device) -> bool:
    """Whether products with ``weight`` can be made in 8 bits on ``device``.

    They can with blocks of Q4_0 and Q8_0, which for a convolution lie along the channels of a tap, on a GPU whose
    family has launches for them. Loads no Triton.
    """
    if weight.qtype not in INT8_TYPES or gpu_family(device) not in UNTUNED_INT8:
        return False
    if len(weight.shape) == 2:
        return True
    _, ic, kh, kw = weight.shape
    return ic % 32 == 0 and (weight.tap_major or kh == kw == 1)
