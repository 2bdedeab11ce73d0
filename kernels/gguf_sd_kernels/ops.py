"""The public functions, one place that decides which implementation runs.

Every function takes CPU and CUDA tensors of float32, float16 and bfloat16. ``linear``, ``linear_geglu`` and
``conv2d`` take quantised weights; ``product``, ``product_geglu`` and ``convolve`` are the same with plain ones.
"""

from __future__ import annotations

from gguf_sd_kernels.cpu.activation import geglu
from gguf_sd_kernels.cpu.attention import attention
from gguf_sd_kernels.cpu.conv import convolve
from gguf_sd_kernels.cpu.linear import product, product_geglu
from gguf_sd_kernels.cpu.norm import group_norm_silu
from gguf_sd_kernels.formats import FORMATS, BlockFormat, row_bytes, row_values
from gguf_sd_kernels.reference.products import conv2d, dequantize, linear, linear_geglu

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
