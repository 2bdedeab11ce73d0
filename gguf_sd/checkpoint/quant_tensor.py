"""A tensor as it lies in a GGUF file: blocks, their type, and the shape they stand for."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from gguf_sd_kernels import ops


@dataclass(frozen=True)
class QuantTensor:
    """Quantised blocks of a weight.

    ``blocks`` is uint8 [rows, bytes of a row]; ``shape`` the logical shape in torch order, [out, in] or
    [out, in, kh, kw]. The rows of a convolution hold (kh, kw, in) where ``tap_major``, else (in, kh, kw).
    """

    blocks: Tensor
    qtype: str  # a key of gguf_sd_kernels.formats.FORMATS, such as "Q4_0"
    shape: tuple[int, ...]
    tap_major: bool = False

    @property
    def nbytes(self) -> int:
        return self.blocks.numel()

    @property
    def numel(self) -> int:
        return prod(self.shape)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight in full, [*shape]; channels-last memory where ``tap_major``."""
        flat = ops.dequantize(self.blocks, self.qtype, dtype)
        if not self.tap_major:
            return flat.reshape(self.shape)
        out, channels, kh, kw = self.shape
        return flat.view(out, kh, kw, channels).permute(0, 3, 1, 2)
