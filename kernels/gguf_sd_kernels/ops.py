"""The public functions, one place that decides which implementation runs.

Every function takes CPU and CUDA tensors of float32, float16 and bfloat16.
"""

from __future__ import annotations

from .activation import geglu
from .attention import attention
from .formats import FORMATS, BlockFormat, row_bytes, row_values
from .norm import group_norm_silu
from .reference import conv2d, dequantize, linear

__all__ = [
    "FORMATS",
    "BlockFormat",
    "attention",
    "conv2d",
    "dequantize",
    "geglu",
    "group_norm_silu",
    "linear",
    "row_bytes",
    "row_values",
]
