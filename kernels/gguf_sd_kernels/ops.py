"""The public functions, one place that decides which implementation runs.

Every function takes CPU and CUDA tensors of float32, float16 and bfloat16. ``linear``, ``linear_geglu`` and
``conv2d`` take quantised weights; ``product``, ``product_geglu`` and ``convolve`` are the same with plain ones.
"""

from __future__ import annotations

from .activation import geglu
from .attention import attention
from .conv_cpu import convolve
from .formats import FORMATS, BlockFormat, row_bytes, row_values
from .linear_cpu import product, product_geglu
from .norm import group_norm_silu
from .reference import conv2d, dequantize, linear, linear_geglu

__all__ = [
    "FORMATS",
    "BlockFormat",
    "attention",
    "conv2d",
    "convolve",
    "dequantize",
    "geglu",
    "group_norm_silu",
    "linear",
    "linear_geglu",
    "product",
    "product_geglu",
    "row_bytes",
    "row_values",
]
