"""Tensors of a source as they lie in the file, after a look for values that no type there holds."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from gguf_sd.errors import GgufSdError
from gguf_sd_convert.progress import Progress
from gguf_sd_convert.quantize.policy import Stored
from gguf_sd_convert.quantize.quantizers import quantize
from gguf_sd_convert.quantize.requantize import copied, copies
from gguf_sd_convert.quantize.scales import F16_MAX
from gguf_sd_convert.sources.entries import Entry
from gguf_sd_convert.workers import in_order
from gguf_sd_kernels.formats import FORMATS

WIDE = (torch.float64, torch.float32, torch.bfloat16)  # dtypes with values that F16 cannot hold
PLAIN_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_twice(entry: Entry) -> bool:
    return entry.dtype in WIDE and entry.blocks is None


def outside_f16(tensors: dict[str, Entry], pool: ThreadPoolExecutor, progress: Progress | None, total: int) -> set[str]:
    """Names of tensors with values beyond F16. Only dtypes that have such are read."""
    wide = {name: entry for name, entry in tensors.items() if read_twice(entry)}
    jobs = ((entry.nbytes, partial(_largest_of, name, entry)) for name, entry in wide.items())
    done, found = 0, set()
    for (name, entry), value in zip(wide.items(), in_order(jobs, pool), strict=True):
        if value > F16_MAX:
            found.add(name)
        done += entry.nbytes
        if progress:
            progress(done, total, "checking")
    return found


def _largest_of(name: str, entry: Entry) -> float:
    return _largest(name, entry.load())


def _largest(name: str, x: Tensor) -> float:
    """The largest magnitude; raises GgufSdError for NaN and infinity."""
    low, high = torch.aminmax(x)
    largest = torch.maximum(low.abs(), high.abs()).item()
    if not largest < float("inf"):
        raise GgufSdError(f"tensor {name} of the source holds NaN or infinity; get an intact copy of the model")
    return largest


def encode(tensor: Stored, entry: Entry) -> Tensor:
    """The tensor's bytes for the file: uint8 blocks [rows, bytes], or values of the plain type. Raises GgufSdError for
    NaN and infinity in a dtype that :data:`WIDE` does not name; the others are looked through beforehand."""
    if copies(tensor, entry):
        return copied(tensor, entry)
    x = entry.load().reshape(tensor.logical)
    if entry.blocks and tensor.type == "F16" and _largest(tensor.name, x) > F16_MAX:
        raise GgufSdError(f"tensor {tensor.name} of the source has values beyond F16; convert the original")
    if not read_twice(entry):
        _largest(tensor.name, x if entry.dtype == torch.float16 else x.float())
    if tensor.type not in FORMATS:
        return x.to(PLAIN_DTYPES[tensor.type]).contiguous()
    if tensor.tap_major:
        x = x.permute(0, 2, 3, 1)
    return quantize(x.reshape(tensor.shape), tensor.type)
