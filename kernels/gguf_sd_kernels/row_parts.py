"""What takes a layer norm's place between two products: see :mod:`gguf_sd_kernels.triton.row_norm`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_PARTS = 32  # of a row, that a product joins


@dataclass(frozen=True)
class RowParts:
    """The mean, and the sum of squared deviations from it, of each part of ``width`` values of rows ``[M, C]``: float32
    ``[2, parts, M]``; the last part of a row may be shorter."""

    values: Tensor
    width: int

    @classmethod
    def of(cls, rows: Tensor, width: int) -> RowParts:
        """In plain torch: of ``[M, C]``."""
        means, deviations = [], []
        for part in rows.float().split(width, dim=1):
            means.append(part.mean(1))
            deviations.append((part - means[-1][:, None]).square().sum(1))
        return cls(torch.stack([torch.stack(means), torch.stack(deviations)]), width)

    def check(self, rows: int, columns: int) -> None:
        """Raises ValueError for others than those of ``rows`` rows of so many values, and more than are joined."""
        parts = -(-columns // self.width)
        if self.values.shape != (2, parts, rows) or not self.joinable:
            raise ValueError(
                f"{rows} rows of {columns} values in parts of {self.width} have statistics [2, {parts}, {rows}], of at "
                f"most {MAX_PARTS} parts, got {list(self.values.shape)}"
            )

    @property
    def joinable(self) -> bool:
        """Whether there are few enough of them for a product to take."""
        return self.values.shape[1] <= MAX_PARTS


@dataclass(frozen=True)
class FoldedNorm:
    """A layer norm and the linear layer with weight w [N, K] behind it, as one product takes both: the norm's ``gain``
    [K]; float32 [N] ``sums`` of w with that gain, and ``bias``, the layer's own plus w times the norm's."""

    gain: Tensor
    sums: Tensor
    bias: Tensor
    eps: float

    @classmethod
    def of(
        cls, weight: Tensor, bias: Tensor | None, norm_weight: Tensor, norm_bias: Tensor, eps: float, dtype: torch.dtype
    ) -> FoldedNorm:
        """For activations of ``dtype``; ``weight`` [N, K] is decoded, to :func:`decoded_dtype` of that.

        The sums are of what the kernel multiplies with, rounded as it rounds: else a row's mean would leave its
        share of those roundings behind.
        """
        gain = norm_weight.to(dtype)
        sums = (weight * gain.to(weight.dtype)).to(dtype).float().sum(1)
        shift = weight.float() @ norm_bias.float()
        return cls(gain, sums, shift if bias is None else shift + bias.float(), eps)

    def fits(self, x: Tensor) -> bool:
        """Whether it was made for activations of x's dtype, where x is."""
        return self.gain.dtype == x.dtype and self.gain.device == x.device


def decoded_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the kernels decode weights to, before they are rounded to the ``dtype`` of activations."""
    return torch.float16 if dtype == torch.float16 else torch.float32
