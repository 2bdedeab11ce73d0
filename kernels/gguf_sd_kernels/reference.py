"""Quantised products in plain torch: the path CPUs take, and the oracle the GPU kernels are tested against.

Weights stay in their GGML blocks and are decoded when they are used. Decoding happens in float32 and is bit
for bit what ``gguf.quants.dequantize`` gives; 16-bit results are that, rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .formats import block_format, row_bytes, row_values

# Values decoded at a time: input, float32 intermediate and result of a chunk stay in a core's L2 cache.
CHUNK_VALUES = 1 << 16


def dequantize(blocks: Tensor, qtype: str, dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
    """Decodes blocks, uint8 ``[rows, row_bytes]``, to ``[rows, cols]`` of ``dtype`` on the same device.

    ``out``, when given, is a contiguous ``[rows, cols]`` tensor of ``dtype`` that receives the result.
    Raises ValueError for blocks or an ``out`` of another shape, type or device.
    """
    _check_blocks(blocks, qtype)
    rows, cols = blocks.shape[0], row_values(qtype, blocks.shape[1])
    if out is None:
        out = torch.empty(rows, cols, dtype=dtype, device=blocks.device)
    elif out.shape != (rows, cols) or out.dtype != dtype or out.device != blocks.device or not out.is_contiguous():
        raise ValueError(
            f"out must be a contiguous {(rows, cols)} {dtype} tensor on {blocks.device}, "
            f"got {tuple(out.shape)} {out.dtype} on {out.device}, strides {out.stride()}"
        )
    fmt = block_format(qtype)
    in_blocks = blocks.contiguous().view(-1, fmt.type_size)
    out_blocks = out.view(-1, fmt.block_size)
    step = CHUNK_VALUES // fmt.block_size
    for start in range(0, in_blocks.shape[0], step):
        out_blocks[start : start + step] = _decode(in_blocks[start : start + step], qtype)
    return out


def linear(x: Tensor, blocks: Tensor, qtype: str, bias: Tensor | None = None) -> Tensor:
    """``x @ W.T + bias``: ``x [..., in]``, blocks of ``W [out, in]``, ``bias [out]`` -> ``[..., out]``.

    Computes in ``x.dtype``. Raises ValueError when x or the bias does not fit the blocks.
    """
    _check_blocks(blocks, qtype)
    out_features, in_features = blocks.shape[0], row_values(qtype, blocks.shape[1])
    if x.ndim < 1 or x.shape[-1] != in_features:
        raise ValueError(f"x {tuple(x.shape)} does not end in the weight's {in_features} inputs")
    _check_bias(bias, out_features)
    weight = dequantize(blocks, qtype, x.dtype)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


def conv2d(
    x: Tensor,
    blocks: Tensor,
    qtype: str,
    shape: tuple[int, int, int, int],
    bias: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    *,
    tap_major: bool,
) -> Tensor:
    """Convolves ``x [B, IC, H, W]`` with a weight of ``shape`` (OC, IC, KH, KW) -> ``[B, OC, H', W']``.

    ``tap_major``: rows hold (KH, KW, IC), which decode straight into a channels-last weight; otherwise they
    hold (IC, KH, KW). Computes in ``x.dtype``.
    Raises ValueError when x, blocks and shape do not fit one another.
    """
    out_channels, in_channels, *_ = shape
    if x.ndim != 4 or x.shape[1] != in_channels:
        raise ValueError(f"x {tuple(x.shape)} is not [B, {in_channels}, H, W], which a weight {shape} takes")
    _check_bias(bias, out_channels)
    weight = conv_weight(blocks, qtype, shape, x.dtype, tap_major=tap_major)
    return F.conv2d(x, weight, None if bias is None else bias.to(x.dtype), stride, padding)


def conv_weight(
    blocks: Tensor,
    qtype: str,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    out: Tensor | None = None,
    *,
    tap_major: bool,
) -> Tensor:
    """Decodes a conv weight to ``[OC, IC, KH, KW]``: channels-last strides if ``tap_major``, else contiguous.

    ``out`` is as in :func:`dequantize`, ``[OC, IC*KH*KW]``; the result is a view of it.
    Raises ValueError when the blocks do not hold ``shape``.
    """
    _check_blocks(blocks, qtype)
    oc, ic, kh, kw = shape
    if tuple(blocks.shape) != (oc, row_bytes(qtype, ic * kh * kw)):
        raise ValueError(
            f"{qtype} blocks of a conv weight {shape} are [{oc}, {row_bytes(qtype, ic * kh * kw)}], "
            f"got {list(blocks.shape)}"
        )
    flat = dequantize(blocks, qtype, dtype, out)
    return flat.view(oc, kh, kw, ic).permute(0, 3, 1, 2) if tap_major else flat.view(oc, ic, kh, kw)


def _decode(blocks: Tensor, qtype: str) -> Tensor:
    """uint8 ``[n, type_size]`` -> float32 ``[n, block_size]``, field by field in file order."""
    fmt = block_format(qtype)
    d, m, high, quants = blocks.split([fmt.scale_bytes, fmt.min_bytes, fmt.high_bytes, fmt.quant_bytes], dim=1)
    if fmt.quant_bytes == fmt.block_size:
        q = quants.view(torch.int8).float()
    else:
        q = _nibbles(quants)
        if fmt.high_bytes:
            q |= _bits(high) << 4
        q = q.float().sub_(fmt.zero_point)
    q *= d.view(torch.float16).float()
    if fmt.min_bytes:
        q += m.view(torch.float16).float()
    return q


def _nibbles(quants: Tensor) -> Tensor:
    """uint8 ``[n, 16]`` -> uint8 ``[n, 32]``: all low halves, then all high halves."""
    return torch.cat([quants & 0x0F, quants >> 4], dim=1)


def _bits(high: Tensor) -> Tensor:
    """uint8 ``[n, 4]`` -> uint8 ``[n, 32]`` of 0 and 1, lowest bit first."""
    shifts = torch.arange(8, dtype=torch.uint8, device=high.device)
    return ((high.unsqueeze(-1) >> shifts) & 1).flatten(1)


def _check_blocks(blocks: Tensor, qtype: str) -> None:
    if blocks.dtype != torch.uint8 or blocks.ndim != 2:
        raise ValueError(f"{qtype} blocks are uint8 [rows, row_bytes], got {blocks.dtype} {list(blocks.shape)}")
    row_values(qtype, blocks.shape[1])


def _check_bias(bias: Tensor | None, features: int) -> None:
    if bias is not None and tuple(bias.shape) != (features,):
        raise ValueError(f"the bias of {features} outputs is [{features}], got {list(bias.shape)}")
