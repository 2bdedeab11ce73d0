"""The one way to start a Triton kernel: on the operands' device, with every promise to the compiler kept.

A launch is prepared once for operands of some shapes and dtypes and then only started: Triton's own dispatch, which
finds the compiled kernel anew at each call, is gone through the first time alone. Afterwards the compiled kernel is
handed addresses, which every driver of Triton takes as they are, where it would ask a tensor for its own once more and
the driver whether it may be read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gguf_sd_kernels.devices import as_current, current_device

# Pointers are promised to the compiler as multiples of this many bytes.
ALIGNMENT = 16
# What the compiler is told of every kernel. Whether it may join a product and a sum has another default in each Triton.
OPTIONS = {"enable_fp_fusion": True}


class PreparedLaunch:
    """A kernel with its grid, its numbers and its constants, to be started with operands alone.

    ``kernel`` is a @triton.jit function whose arguments are operands, then ``numbers``, then ``constants``;
    ``options`` are the compiler's, such as ``num_warps``. Operands are tensors on ``device``, or None for those the
    kernel does without; the same ones are None, and each is of the same dtype, every time.
    """

    def __init__(
        self,
        kernel: Any,
        grid: Sequence[int],
        device: torch.device,
        numbers: Sequence[float],
        constants: Mapping[str, Any],
        **options: int,
    ):
        self.kernel, self.device = kernel, device
        self.grid = (*grid, 1, 1)[:3]
        self.names: list[str] = kernel.arg_names[: len(kernel.arg_names) - len(numbers) - len(constants)]
        self.numbers, self.constants, self.options = tuple(numbers), dict(constants), OPTIONS | options
        self._after = (*numbers, *(constants[name] for name in kernel.arg_names[len(self.names) + len(numbers) :]))
        self._number = -1 if device.index is None else device.index  # as Tensor.get_device gives it
        self._start: Callable[..., object] | None = None  # past Triton's dispatch

    def __call__(self, *operands: Tensor | None) -> None:
        """Starts the kernel. Raises ValueError where an operand lies on another device, or unaligned."""
        number = self._number
        addresses: list[int | None] = []
        for operand in operands:
            if operand is None:
                addresses.append(None)
                continue
            address = operand.data_ptr()
            if address % ALIGNMENT or operand.get_device() != number:
                self._refuse(operands)
            addresses.append(address)
        if self._start is None:
            self._first(operands)
        elif number < 0 or current_device() == number:
            self._start(*addresses, *self._after)
        else:
            with as_current(self.device):
                self._start(*addresses, *self._after)

    def _first(self, operands: Sequence[Tensor | None]) -> None:
        """Starts the kernel through Triton's dispatch, which compiles it, and keeps what came of that. In Triton's
        interpreter nothing does, and every start is a first one."""
        if len(operands) != len(self.names):
            raise ValueError(f"{self.kernel.__name__} takes {len(self.names)} operands, got {len(operands)}")
        with as_current(self.device):
            compiled = self.kernel[self.grid](*operands, *self.numbers, **self.constants, **self.options)
            if hasattr(compiled, "__getitem__"):
                self._start = compiled[self.grid]

    def _refuse(self, operands: Sequence[Tensor | None]) -> None:
        for name, operand in zip(self.names, operands, strict=True):
            if operand is None:
                continue
            where = f"{name} of {self.kernel.__name__}"
            if operand.get_device() != self._number:
                raise ValueError(f"{where} is on {operand.device}, the other operands are on {self.device}")
            if operand.data_ptr() % ALIGNMENT:
                raise ValueError(f"{where} starts at {operand.data_ptr():#x}, which is no multiple of {ALIGNMENT}")


def allocator(
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    layout: torch.memory_format = torch.contiguous_format,
) -> Callable[[], Tensor]:
    """Makes uninitialised tensors, one at a call. Given the strides, torch takes two thirds of the time that it takes
    with the layout they follow from."""
    strides = torch.empty(shape, device="meta", memory_format=layout).stride()
    return partial(torch.empty_strided, tuple(shape), strides, dtype=dtype, device=device)


def in_order(tensor: Tensor | None) -> Tensor | None:
    """The tensor, contiguous and aligned; copied where it is not."""
    if tensor is None:
        return None
    if tensor.is_contiguous():
        return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()
    return tensor.contiguous()


def channels_last(pictures: Tensor | None) -> Tensor | None:
    """Pictures ``[B, C, H, W]`` with their channels innermost, aligned; copied where they are not."""
    if pictures is None:
        return None
    if pictures.is_contiguous(memory_format=torch.channels_last):
        return pictures if pictures.data_ptr() % ALIGNMENT == 0 else pictures.clone()
    return pictures.contiguous(memory_format=torch.channels_last)


def with_rows(rows: Tensor | None) -> Tensor | None:
    """``[B, N]`` whose rows are contiguous, whatever lies between them, and aligned; copied where they are not."""
    if rows is None or (rows.stride(1) == 1 and rows.data_ptr() % ALIGNMENT == 0):
        return rows
    return rows.clone(memory_format=torch.contiguous_format)
