"""Weights that are no numbers, found where they are read: a picture of NaN would blame the wrong part."""

from __future__ import annotations

import torch
from torch import Tensor

from gguf_sd.checkpoint.quant_tensor import QuantTensor
from gguf_sd.errors import GgufSdError
from gguf_sd_kernels.formats import BlockFormat, quant_format

HALF = 2  # bytes of a float16
SIXTEEN_BIT_INTEGERS = ("IQ4_XS", 1)  # the one field of two bytes that is no float16: scales_h


def cast(stored: Tensor | QuantTensor, dtype: torch.dtype, name: str, where: str) -> Tensor:
    """The tensor in full, in ``dtype``; four dimensions lie channels-last, as convolutions run, which need not reorder
    a weight then at every call. Raises GgufSdError where ``where``'s tensor ``name`` holds NaN or infinity, or
    values beyond ``dtype``."""
    full = stored.dequantize(dtype) if isinstance(stored, QuantTensor) else _converted(stored, dtype)
    if is_finite(full):
        return full
    original = stored.dequantize(torch.float32) if isinstance(stored, QuantTensor) else stored
    if not is_finite(original):
        raise _no_numbers(name, where)
    kind = str(dtype).removeprefix("torch.")
    raise GgufSdError(
        f"{where}: tensor {name} has values up to {original.abs().max().item():g}, beyond the range of {kind}; "
        "take --dtype bfloat16 or float32"
    )


def _converted(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """In one copy, or none."""
    order = torch.channels_last if stored.dim() == 4 else torch.preserve_format
    return stored.to(dtype, memory_format=order)


def is_finite(x: Tensor) -> bool:
    """Whether every value is a number. Some 20 times as fast as ``x.isfinite().all()``: one pass, nothing written."""
    if x.is_meta or not x.numel():  # there are no values to look at
        return True
    low, high = torch.aminmax(x)  # NaN, if one is there
    return bool(torch.isfinite(low) & torch.isfinite(high))


def check_blocks(stored: QuantTensor, name: str, where: str) -> None:
    """Raises GgufSdError where a block's scale or minimum is NaN or infinite; every code is a number."""
    if stored.blocks.is_meta:
        return
    fmt = quant_format(stored.qtype)
    fields = (fmt.scale_bytes, fmt.min_bytes) if isinstance(fmt, BlockFormat) else fmt.field_bytes
    blocks, start = stored.blocks.reshape(-1, fmt.type_size), 0
    for index, size in enumerate(fields):
        if size == HALF and (stored.qtype, index) != SIXTEEN_BIT_INTEGERS:
            upper = blocks[:, start + 1].numpy(force=True)  # all of a float16's exponent lies in its second byte
            if ((upper & 0x7C) == 0x7C).any():
                raise _no_numbers(name, where)
        start += size


def _no_numbers(name: str, where: str) -> GgufSdError:
    return GgufSdError(
        f"{where}: tensor {name} holds NaN or infinity; the file is damaged, or made of a damaged one: "
        "download or convert it again"
    )
