"""The data of a weight file as tensors. It stays memory-mapped: what is never touched is never read."""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from gguf_sd.checkpoint.gguf_header import TensorInfo
from gguf_sd.checkpoint.quant_tensor import QuantTensor
from gguf_sd.errors import GgufSdError
from gguf_sd_kernels.formats import FORMATS

# Linux maps, with a page of a file that is touched, those around it that it has in its cache, up to so many bytes in
# all (fault_around_bytes, 64 KiB unless a debugging interface changed it). A multiple of every size of a page in use.
FAULT_AROUND = 1 << 16
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
DTYPES |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}  # of safetensors files


class MappedTensors:
    """The tensors of one file. Raises GgufSdError where it cannot be mapped."""

    def __init__(self, path: Path, size: int):
        self.path = path
        try:
            with open(path, "rb") as file:
                # A private mapping: torch wants writable memory, nothing ever writes to it.
                self._mapping = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:  # ValueError: shorter than it was
            raise GgufSdError(f"cannot read {path}: {error}; is it still being written?") from error
        self._data = torch.frombuffer(self._mapping, dtype=torch.uint8)

    def tensor(self, info: TensorInfo, shape: tuple[int, ...], tap_major: bool) -> Tensor | QuantTensor:
        """A tensor in its logical ``shape``, backed by the mapped file. Types outside gguf_sd_kernels.formats.FORMATS,
        and shapes whose rows are no whole number of blocks, are dequantised to F16 here."""
        return as_tensor(self._bytes(info), info, shape, tap_major, self.path)

    def forget_pages(self, tensors: Iterable[Tensor] | None = None) -> None:
        """Gives the memory behind everything read so far back, or behind these tensors and what the system read around
        them; what is touched again is read again."""
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        if tensors is None:
            self._mapping.madvise(mmap.MADV_DONTNEED)
        else:
            self._advise(tensors, mmap.MADV_DONTNEED)

    def expect(self, tensors: Iterable[Tensor]) -> None:
        """Has the system read the pages behind these tensors, where they are not in its cache, while we go on."""
        if hasattr(mmap, "MADV_WILLNEED"):
            self._advise(tensors, mmap.MADV_WILLNEED)

    def holds(self, tensor: Tensor) -> bool:
        """Whether the tensor is a view of the mapped file."""
        return tensor.untyped_storage().data_ptr() == self._data.untyped_storage().data_ptr()

    def _advise(self, tensors: Iterable[Tensor], advice: int) -> None:
        """For runs of neighbours together, which takes fewer calls."""
        end = len(self._mapping)
        ranges = sorted(self._pages(tensor) for tensor in tensors if self.holds(tensor) and tensor.numel())
        start = stop = 0
        for first, last in ranges:
            if first > stop:
                if stop:
                    self._mapping.madvise(advice, start, min(stop, end) - start)
                start = first
            stop = max(stop, last)
        if stop:
            self._mapping.madvise(advice, start, min(stop, end) - start)

    def _pages(self, tensor: Tensor) -> tuple[int, int]:
        first = tensor.data_ptr() - self._data.data_ptr()
        extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        last = first + extent * tensor.element_size()
        return first // FAULT_AROUND * FAULT_AROUND, -(-last // FAULT_AROUND) * FAULT_AROUND

    def _bytes(self, info: TensorInfo) -> Tensor:
        raw = self._data[info.offset : info.offset + info.nbytes]
        return raw if info.offset % 8 == 0 else raw.clone()


def as_tensor(
    raw: Tensor, info: TensorInfo, shape: tuple[int, ...], tap_major: bool, path: Path
) -> Tensor | QuantTensor:
    """A tensor in its logical ``shape`` from its bytes, uint8 [info.nbytes]; see :meth:`MappedTensors.tensor`."""
    if not info.quantized:
        return raw.view(DTYPES[info.type.name]).view(shape)
    kind = FORMATS.get(info.type.name)
    if kind is None or len(shape) < 2 or prod(shape[1:]) % kind.block_size:
        return dequantized(raw, info, path).to(torch.float16).view(shape)
    return QuantTensor(raw.view(shape[0], -1), kind.name, shape, tap_major)


def dequantized(raw: Tensor, info: TensorInfo, path: Path) -> Tensor:
    """The values of any type that gguf-py can decode, float32. Raises GgufSdError for others."""
    import gguf
    import numpy as np

    try:
        values = gguf.quants.dequantize(raw.numpy(), gguf.GGMLQuantizationType[info.type.name])
    except (NotImplementedError, KeyError):
        raise GgufSdError(f"{path} holds tensor {info.name} as {info.type.name}, which cannot be read") from None
    return torch.from_numpy(np.ascontiguousarray(values))
