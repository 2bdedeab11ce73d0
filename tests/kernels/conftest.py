"""Triton kernels are tested on the GPU where there is one, else on CPU tensors in Triton's interpreter."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run."""
    return DEVICE


class Material:
    """Seeded weights and activations, and the measure of error."""

    @staticmethod
    def weight(qtype: str, rows: int, cols: int, seed: int) -> tuple[Tensor, Tensor]:
        """Gaussian weights quantised by gguf-py: the blocks, and what gguf-py decodes, in float64; on DEVICE."""
        values = np.random.default_rng(seed).standard_normal((rows, cols), dtype=np.float32) * 0.05
        kind = gguf.GGMLQuantizationType[qtype]
        blocks = gguf.quants.quantize(values, kind)
        decoded = gguf.quants.dequantize(blocks, kind)
        return torch.from_numpy(blocks).to(DEVICE), torch.from_numpy(decoded).double().to(DEVICE)

    @staticmethod
    def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float16) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)

    @staticmethod
    def error(got: Tensor, want: Tensor) -> float:
        """Relative error in the Euclidean norm; fails on a shape that is not the wanted one."""
        assert got.shape == want.shape
        return float((got.double() - want).norm() / want.norm())


@pytest.fixture(scope="session")
def material() -> type[Material]:
    return Material
